//! Device nodes of a container, and the filter that says which devices it may use at all.
//!
//! Source: OCI runtime-spec config-linux.md "Default Devices", "Device allowed list".

use std::cell::RefCell;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::rc::Rc;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag};
use nix::sys::stat::{FchmodatFlags, Mode, SFlag, fchmodat, makedev, mknodat};
use nix::unistd::{Gid, Uid, fchownat, symlinkat};

use super::rootfs::{ensure, open_in};
use super::tree::Tree;
use crate::pb::grpc::{LinuxDevice, LinuxDeviceCgroup, LinuxResources};
use crate::status::{Context, Result, Status};

/// Name, major and minor of the character devices that every container has.
const DEFAULT: [(&str, i64, i64); 6] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];
const LINKS: [(&str, &str); 5] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];

/// Makes the nodes and links of /dev, and those that the spec asks for.
pub fn populate(root: BorrowedFd<'_>, devices: &[LinuxDevice]) -> Result<()> {
    for (path, major, minor) in DEFAULT {
        let device = LinuxDevice {
            path: path.to_owned(),
            r#type: "c".to_owned(),
            major,
            minor,
            file_mode: 0o666,
            ..LinuxDevice::default()
        };
        make(root, &device).context(|| format!("making {path}"))?;
    }
    for device in devices {
        make(root, device).context(|| format!("making device {}", device.path))?;
    }
    let directory = ensure(root, Path::new("/dev"), true).context(|| "/dev".to_owned())?;
    for (name, target) in LINKS {
        match symlinkat(target, &directory, name) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(error) => return Err(Status::internal(format!("linking /dev/{name}: {error}"))),
        }
    }
    Ok(())
}

fn make(root: BorrowedFd<'_>, device: &LinuxDevice) -> Result<()> {
    let path = Path::new(&device.path);
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Status::invalid(format!("device path {:?}", device.path)));
    };
    let kind = match device.r#type.as_str() {
        "c" | "u" => SFlag::S_IFCHR,
        "b" => SFlag::S_IFBLK,
        "p" => SFlag::S_IFIFO,
        other => return Err(Status::invalid(format!("device type {other:?}"))),
    };
    let what = || device.path.clone();
    let number = |value: i64| u64::try_from(value).context(what);
    let number = makedev(number(device.major)?, number(device.minor)?);
    let mode = if device.file_mode == 0 { 0o666 } else { device.file_mode & 0o7777 };
    let mode = Mode::from_bits_truncate(mode);
    let directory = ensure(root, parent, true).context(what)?;
    match mknodat(&directory, name, kind, mode, number) {
        Ok(()) => {}
        // An image may bring its own; it is used as it is.
        Err(Errno::EEXIST) => {
            open_in(root, path, OFlag::O_PATH).context(what)?;
            return Ok(());
        }
        Err(Errno::EPERM) => return show(root, path, kind, number),
        Err(error) => return Err(Status::internal(error.to_string())),
    }
    fchmodat(&directory, name, mode, FchmodatFlags::FollowSymlink).context(what)?;
    let (uid, gid) = (Uid::from_raw(device.uid), Gid::from_raw(device.gid));
    fchownat(&directory, name, Some(uid), Some(gid), AtFlags::AT_SYMLINK_NOFOLLOW).context(what)
}

/// In a user namespace nodes can't be made; the guest's own is shown instead.
fn show(root: BorrowedFd<'_>, path: &Path, kind: SFlag, number: u64) -> Result<()> {
    let entries = std::fs::read_dir("/dev").context(|| "/dev".to_owned())?;
    let own = entries.flatten().map(|entry| entry.path()).find(|own| {
        let status = nix::sys::stat::lstat(own);
        status.is_ok_and(|status| {
            SFlag::from_bits_truncate(status.st_mode & libc::S_IFMT) == kind
                && status.st_rdev == number
        })
    });
    let own = own.ok_or_else(|| Status::internal("the guest has no such device"))?;
    let tree = Tree::open(&own.to_string_lossy(), false).context(|| "opening it".to_owned())?;
    let place = ensure(root, path, false).context(|| "its place".to_owned())?;
    tree.place(place.as_fd()).context(|| "binding it".to_owned())?;
    Ok(())
}

// eBPF. Source: bpf(2), linux/bpf.h, linux/bpf_common.h.
const PROG_LOAD: libc::c_int = 5;
const PROG_ATTACH: libc::c_int = 8;
const PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const ATTACH_CGROUP_DEVICE: u32 = 6;
const ALLOW_MULTI: u32 = 2;
const LOAD_WORD: u8 = 0x61; // BPF_LDX | BPF_MEM | BPF_W
const MOVE_REGISTER: u8 = 0xbc; // BPF_ALU | BPF_MOV | BPF_X
const MOVE_VALUE: u8 = 0xb4; // BPF_ALU | BPF_MOV | BPF_K
const AND_VALUE: u8 = 0x54; // BPF_ALU | BPF_AND | BPF_K
const SHIFT_RIGHT: u8 = 0x74; // BPF_ALU | BPF_RSH | BPF_K
const JUMP_IF_NOT_EQUAL: u8 = 0x55; // BPF_JMP | BPF_JNE | BPF_K
const EXIT: u8 = 0x95; // BPF_JMP | BPF_EXIT
/// The verifier takes more; a spec with more rules than this is not one of ours.
const MAX_RULES: usize = 256;

/// One instruction as the kernel reads it.
fn instruction(code: u8, target: u8, source: u8, offset: i16, value: i32) -> u64 {
    u64::from(code)
        | u64::from(target | source << 4) << 8
        | u64::from(offset.cast_unsigned()) << 16
        | u64::from(value.cast_unsigned()) << 32
}

/// The rules of the spec as a program: the last rule that matches decides, so it comes first; what
/// no rule speaks of is denied.
fn program(rules: &[LinuxDeviceCgroup]) -> Result<Vec<u64>> {
    // Context: word 0 is access << 16 | type, word 1 major, word 2 minor.
    let mut code = vec![
        instruction(LOAD_WORD, 2, 1, 0, 0),
        instruction(MOVE_REGISTER, 3, 2, 0, 0),
        instruction(AND_VALUE, 2, 0, 0, 0xffff), // r2: type, 1 block, 2 character
        instruction(SHIFT_RIGHT, 3, 0, 0, 16),   // r3: access, 1 mknod, 2 read, 4 write
        instruction(LOAD_WORD, 4, 1, 4, 0),
        instruction(LOAD_WORD, 5, 1, 8, 0),
    ];
    for rule in rules.iter().rev() {
        let mut tests: Vec<(u8, i32)> = Vec::new();
        match rule.r#type.as_str() {
            "a" | "" => {}
            "b" => tests.push((2, 1)),
            "c" | "u" => tests.push((2, 2)),
            other => return Err(Status::invalid(format!("device rule of type {other:?}"))),
        }
        // A number that the original spec did not have is "any": the protocol has -1 for it, and
        // shims that copy an absent number send 0. No device has major number 0.
        let named = !tests.is_empty() && rule.major > 0;
        if named {
            tests.push((4, narrow(rule.major)?));
        }
        if named && rule.minor >= 0 {
            tests.push((5, narrow(rule.minor)?));
        }
        let refused = !access(&rule.access) & 7;
        let body = if refused == 0 { 0 } else { 3 };
        let decides_all = tests.is_empty() && body == 0;
        let mut left = tests.len() + body + 2;
        for (register, value) in tests {
            left -= 1;
            let offset = i16::try_from(left).context(|| "device rules".to_owned())?;
            code.push(instruction(JUMP_IF_NOT_EQUAL, register, 0, offset, value));
        }
        if refused != 0 {
            code.push(instruction(MOVE_REGISTER, 6, 3, 0, 0));
            code.push(instruction(AND_VALUE, 6, 0, 0, refused));
            code.push(instruction(JUMP_IF_NOT_EQUAL, 6, 0, 2, 0));
        }
        code.push(instruction(MOVE_VALUE, 0, 0, 0, i32::from(rule.allow)));
        code.push(instruction(EXIT, 0, 0, 0, 0));
        if decides_all {
            // The verifier refuses instructions that can't be reached.
            return Ok(code);
        }
    }
    code.push(instruction(MOVE_VALUE, 0, 0, 0, 0));
    code.push(instruction(EXIT, 0, 0, 0, 0));
    Ok(code)
}

fn narrow(number: i64) -> Result<i32> {
    i32::try_from(number).context(|| format!("device number {number}"))
}

fn access(letters: &str) -> i32 {
    let bit = |letter| match letter {
        'm' => 1,
        'r' => 2,
        'w' => 4,
        _ => 0,
    };
    letters.chars().fold(0, |mask, letter| mask | bit(letter))
}

thread_local! {
    /// The filter that was made last: containers without devices of their own share it.
    static LAST: RefCell<Option<(Vec<u64>, Rc<OwnedFd>)>> = const { RefCell::new(None) };
}

/// The filter of these rules, loaded into the kernel.
fn filter(resources: Option<&LinuxResources>) -> Result<Rc<OwnedFd>> {
    let rules = resources.map_or(&[][..], |resources| &resources.devices);
    if rules.len() > MAX_RULES {
        return Err(Status::invalid(format!("{} device rules", rules.len())));
    }
    let code = program(rules)?;
    let last = LAST.with(|last| {
        let last = last.borrow();
        last.as_ref().filter(|(present, _)| *present == code).map(|(_, filter)| filter.clone())
    });
    if let Some(filter) = last {
        return Ok(filter);
    }
    let load = Load {
        kind: PROG_TYPE_CGROUP_DEVICE,
        instructions: u32::try_from(code.len()).context(|| "device rules".to_owned())?,
        code: code.as_ptr() as u64,
        license: c"Apache".as_ptr() as u64,
        rest: [0; 12],
    };
    let fd = bpf(PROG_LOAD, &load).context(|| "device filter".to_owned())?;
    // SAFETY: the kernel has just made this descriptor for us, so nobody else owns it.
    let filter = Rc::new(unsafe { OwnedFd::from_raw_fd(fd) });
    LAST.with(|last| *last.borrow_mut() = Some((code, filter.clone())));
    Ok(filter)
}

/// Loads the filter of these rules, so that `restrict` with the same rules only attaches it.
pub fn prepare(resources: &LinuxResources) -> Result<()> {
    filter(Some(resources)).map(drop)
}

/// Lets processes of the cgroup use only the devices that the rules allow.
pub fn restrict(cgroup: BorrowedFd<'_>, resources: Option<&LinuxResources>) -> Result<()> {
    let filter = filter(resources)?;
    let attach = Attach {
        target: cgroup.as_raw_fd().cast_unsigned(),
        program: filter.as_raw_fd().cast_unsigned(),
        kind: ATTACH_CGROUP_DEVICE,
        flags: ALLOW_MULTI,
    };
    bpf(PROG_ATTACH, &attach).context(|| "attaching the device filter".to_owned())?;
    Ok(())
}

/// The kernel's `union bpf_attr`, as far as each command reads it.
#[repr(C)]
struct Load {
    kind: u32,
    instructions: u32,
    code: u64,
    license: u64,
    rest: [u32; 12],
}

#[repr(C)]
struct Attach {
    target: u32,
    program: u32,
    kind: u32,
    flags: u32,
}

fn bpf<T>(command: libc::c_int, attributes: &T) -> nix::Result<i32> {
    // SAFETY: the kernel reads as many bytes as the structure has, and the pointers in it are to
    // memory that lives for the call.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>())
    };
    Errno::result(result).map(|value| i32::try_from(value).unwrap_or(-1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_failed_test_jumps_behind_its_own_rule() {
        let rule = LinuxDeviceCgroup {
            allow: true,
            r#type: "c".to_owned(),
            major: 1,
            minor: 3,
            access: "r".to_owned(),
        };
        let code = program(&[rule]).unwrap();
        // 6 of the prologue, 3 tests, 3 of the access, 2 of the answer, 2 of the denial.
        assert_eq!(code.len(), 16);
        let jumps: Vec<u64> = code[6..9].iter().map(|word| word >> 16 & 0xffff).collect();
        assert_eq!(jumps, [7, 6, 5]);
        assert_eq!(code[11] >> 16 & 0xffff, 2);
    }

    #[test]
    fn rule_of_an_unknown_type_is_refused() {
        let rule = LinuxDeviceCgroup { r#type: "z".to_owned(), ..LinuxDeviceCgroup::default() };
        assert!(program(&[rule]).is_err());
    }
}
