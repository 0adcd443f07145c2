//! The five sets of capabilities of a process.

use nix::errno::Errno;

use crate::pb::grpc::LinuxCapabilities;
use crate::status::{Context, Result, Status};

/// Source: linux/capability.h, by number.
const CAPABILITIES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];
/// Source: linux/capability.h, _LINUX_CAPABILITY_VERSION_3.
const CAPABILITY_VERSION: u32 = 0x2008_0522;
/// What loading a system call filter takes without no_new_privs.
pub const SYS_ADMIN: u64 = 1 << 21;

/// Bits of the five sets.
pub struct Masks {
    bounding: u64,
    effective: u64,
    permitted: u64,
    inheritable: u64,
    ambient: u64,
}

impl Masks {
    pub fn from(sets: &LinuxCapabilities) -> Result<Self> {
        Ok(Self {
            bounding: mask(&sets.bounding)?,
            effective: mask(&sets.effective)?,
            permitted: mask(&sets.permitted)?,
            inheritable: mask(&sets.inheritable)?,
            ambient: mask(&sets.ambient)?,
        })
    }

    /// Gives up for good what the process and its programs may never have.
    pub fn bound(&self) -> Result<()> {
        for number in (0..=last_capability()).filter(|number| self.bounding & (1 << number) == 0) {
            // SAFETY: PR_CAPBSET_DROP takes numbers.
            let result = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, number, 0, 0, 0) };
            Errno::result(result).context(|| format!("dropping capability {number}"))?;
        }
        Ok(())
    }

    /// Takes on the sets, and `more` beside them until `set` is called without it.
    pub fn apply(&self, more: u64) -> Result<()> {
        self.set(more)?;
        for number in (0..64).filter(|number| self.ambient & (1 << number) != 0) {
            // SAFETY: PR_CAP_AMBIENT takes numbers.
            let result = unsafe {
                libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE, number, 0, 0)
            };
            Errno::result(result).context(|| format!("ambient capability {number}"))?;
        }
        Ok(())
    }

    /// Sets all but the ambient ones, of which those stay that may.
    pub fn set(&self, more: u64) -> Result<()> {
        let (effective, permitted) = (self.effective | more, self.permitted | more);
        let header = [CAPABILITY_VERSION, 0];
        let low = |mask: u64| u32::try_from(mask & 0xffff_ffff).unwrap_or(0);
        let high = |mask: u64| u32::try_from(mask >> 32).unwrap_or(0);
        let data = [
            low(effective),
            low(permitted),
            low(self.inheritable),
            high(effective),
            high(permitted),
            high(self.inheritable),
        ];
        // SAFETY: capset reads a header of two words and two triples of words; both are valid for
        // the call. Source: capset(2), version 3.
        let result = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), data.as_ptr()) };
        Errno::result(result).context(|| "setting capabilities".to_owned())?;
        Ok(())
    }
}

/// Whether a process with this bounding set, or a program of its, may look into others.
pub fn may_trace(bounding: &[String]) -> bool {
    let names = |name: &String| name.strip_prefix("CAP_").unwrap_or(name).to_ascii_uppercase();
    bounding.iter().any(|name| names(name) == "SYS_PTRACE")
}

fn mask(names: &[String]) -> Result<u64> {
    let last = last_capability();
    names.iter().try_fold(0, |mask, name| {
        let short = name.strip_prefix("CAP_").unwrap_or(name);
        let number = CAPABILITIES.iter().position(|known| known.eq_ignore_ascii_case(short));
        let number = number.ok_or_else(|| Status::invalid(format!("capability {name:?}")))?;
        // One that this kernel does not know can't be given.
        Ok(if number <= last { mask | 1 << number } else { mask })
    })
}

/// The kernel's last capability.
fn last_capability() -> usize {
    let known = |number: &usize| {
        // SAFETY: PR_CAPBSET_READ takes a number and fails for one that does not exist.
        unsafe { libc::prctl(libc::PR_CAPBSET_READ, *number, 0, 0, 0) >= 0 }
    };
    (0..64).take_while(known).last().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_numbered_as_the_kernel_numbers_them() {
        assert_eq!(mask(&["CAP_CHOWN".into(), "CAP_KILL".into()]).unwrap(), 1 | 1 << 5);
        assert_eq!(mask(&["CAP_SYS_ADMIN".into()]).unwrap(), SYS_ADMIN);
        assert!(mask(&["CAP_NO_SUCH".into()]).is_err());
    }
}
