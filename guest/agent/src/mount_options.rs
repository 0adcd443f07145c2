//! Options of a mount as mount(8) spells them, split into flags and the filesystem's own data.

use nix::mount::MsFlags;

#[derive(Debug, Default, PartialEq)]
pub struct MountOptions {
    pub flags: Flags,
    /// What the filesystem itself reads.
    pub data: String,
    /// What holds for the mounts below as well: attributes of mount_setattr(2).
    pub below: Below,
}

#[derive(Debug, Default, PartialEq)]
pub struct Below {
    pub set: u64,
    pub clear: u64,
}

#[derive(Debug, PartialEq)]
pub struct Flags {
    pub mount: MsFlags,
    /// Propagation can't be set together with anything else.
    pub propagation: MsFlags,
}

impl Default for Flags {
    fn default() -> Self {
        Self { mount: MsFlags::empty(), propagation: MsFlags::empty() }
    }
}

/// Option, flag, and whether the option clears it. Source: mount(8), "FILESYSTEM-INDEPENDENT".
const TABLE: [(&str, MsFlags, bool); 29] = [
    ("async", MsFlags::MS_SYNCHRONOUS, true),
    ("atime", MsFlags::MS_NOATIME, true),
    ("bind", MsFlags::MS_BIND, false),
    ("defaults", MsFlags::empty(), false),
    ("dev", MsFlags::MS_NODEV, true),
    ("diratime", MsFlags::MS_NODIRATIME, true),
    ("dirsync", MsFlags::MS_DIRSYNC, false),
    ("exec", MsFlags::MS_NOEXEC, true),
    ("iversion", MsFlags::MS_I_VERSION, false),
    ("lazytime", MsFlags::MS_LAZYTIME, false),
    ("mand", MsFlags::MS_MANDLOCK, false),
    ("noatime", MsFlags::MS_NOATIME, false),
    ("nodev", MsFlags::MS_NODEV, false),
    ("nodiratime", MsFlags::MS_NODIRATIME, false),
    ("noexec", MsFlags::MS_NOEXEC, false),
    ("noiversion", MsFlags::MS_I_VERSION, true),
    ("nomand", MsFlags::MS_MANDLOCK, true),
    ("norelatime", MsFlags::MS_RELATIME, true),
    ("nostrictatime", MsFlags::MS_STRICTATIME, true),
    ("nosuid", MsFlags::MS_NOSUID, false),
    ("rbind", MsFlags::MS_BIND.union(MsFlags::MS_REC), false),
    ("relatime", MsFlags::MS_RELATIME, false),
    ("remount", MsFlags::MS_REMOUNT, false),
    ("ro", MsFlags::MS_RDONLY, false),
    ("rw", MsFlags::MS_RDONLY, true),
    ("strictatime", MsFlags::MS_STRICTATIME, false),
    ("suid", MsFlags::MS_NOSUID, true),
    ("sync", MsFlags::MS_SYNCHRONOUS, false),
    ("silent", MsFlags::MS_SILENT, false),
];

const PROPAGATION: [(&str, MsFlags); 8] = [
    ("private", MsFlags::MS_PRIVATE),
    ("rprivate", MsFlags::MS_PRIVATE.union(MsFlags::MS_REC)),
    ("shared", MsFlags::MS_SHARED),
    ("rshared", MsFlags::MS_SHARED.union(MsFlags::MS_REC)),
    ("slave", MsFlags::MS_SLAVE),
    ("rslave", MsFlags::MS_SLAVE.union(MsFlags::MS_REC)),
    ("unbindable", MsFlags::MS_UNBINDABLE),
    ("runbindable", MsFlags::MS_UNBINDABLE.union(MsFlags::MS_REC)),
];

/// Recursive options: the plain name, the attribute, and whether the option clears it.
/// Source: the OCI runtime specification, "mounts", Linux options.
const RECURSIVE: [(&str, &str, u64, bool); 8] = [
    ("rdev", "dev", libc::MOUNT_ATTR_NODEV, true),
    ("rexec", "exec", libc::MOUNT_ATTR_NOEXEC, true),
    ("rnodev", "nodev", libc::MOUNT_ATTR_NODEV, false),
    ("rnoexec", "noexec", libc::MOUNT_ATTR_NOEXEC, false),
    ("rnosuid", "nosuid", libc::MOUNT_ATTR_NOSUID, false),
    ("rro", "ro", libc::MOUNT_ATTR_RDONLY, false),
    ("rrw", "rw", libc::MOUNT_ATTR_RDONLY, true),
    ("rsuid", "suid", libc::MOUNT_ATTR_NOSUID, true),
];

/// Sorts options; what is not an option of every mount is data for the filesystem.
pub fn parse(options: &[String]) -> MountOptions {
    let mut parsed = MountOptions::default();
    let mut data: Vec<&str> = Vec::new();
    for option in options.iter().flat_map(|option| option.split(',')).filter(|o| !o.is_empty()) {
        let recursive = RECURSIVE.iter().find(|(name, ..)| *name == option);
        if let Some((_, _, attribute, clears)) = recursive {
            let below = &mut parsed.below;
            let (on, off) = if *clears {
                (&mut below.clear, &mut below.set)
            } else {
                (&mut below.set, &mut below.clear)
            };
            *on |= attribute;
            *off &= !attribute;
        }
        let option = recursive.map_or(option, |(_, plain, ..)| *plain);
        if let Some((_, flag, clears)) = TABLE.iter().find(|(name, _, _)| *name == option) {
            if *clears {
                parsed.flags.mount.remove(*flag);
            } else {
                parsed.flags.mount.insert(*flag);
            }
        } else if let Some((_, flag)) = PROPAGATION.iter().find(|(name, _)| *name == option) {
            parsed.flags.propagation = *flag;
        } else {
            data.push(option);
        }
    }
    parsed.data = data.join(",");
    parsed
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(options: &[&str]) -> MountOptions {
        parse(&options.iter().map(ToString::to_string).collect::<Vec<_>>())
    }

    #[test]
    fn flags_data_and_propagation_are_told_apart() {
        let result = parsed(&["rbind", "nosuid,ro", "rshared", "mode=1777", "size=64m"]);
        let expected = MsFlags::MS_BIND | MsFlags::MS_REC | MsFlags::MS_NOSUID | MsFlags::MS_RDONLY;
        assert_eq!(result.flags.mount, expected);
        assert_eq!(result.flags.propagation, MsFlags::MS_SHARED | MsFlags::MS_REC);
        assert_eq!(result.data, "mode=1777,size=64m");
    }

    #[test]
    fn a_recursive_option_holds_for_the_mount_itself_too() {
        let result = parsed(&["rbind", "rro", "rnosuid"]);
        assert!(result.flags.mount.contains(MsFlags::MS_RDONLY | MsFlags::MS_NOSUID));
        assert_eq!(result.below.set, libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID);
        let result = parsed(&["rro", "rrw"]);
        assert_eq!(result.below, Below { set: 0, clear: libc::MOUNT_ATTR_RDONLY });
        assert_eq!(result.flags.mount, MsFlags::empty());
    }

    #[test]
    fn later_option_takes_back_an_earlier_one() {
        assert_eq!(parsed(&["ro", "rw"]).flags.mount, MsFlags::empty());
    }
}
