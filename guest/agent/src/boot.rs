//! What PID 1 of the guest does before it serves: its mounts and kernel settings.
//!
//! Runs once, before the event loop. Only what nobody can do without stops the boot; the rest is
//! logged, because a guest that serves can at least say what is wrong.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;

use nix::mount::{MsFlags, mount};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{chdir, chroot, setsid};

use crate::status::{Context, Result};
use crate::{error, warn};

pub const CGROUP_ROOT: &str = "/sys/fs/cgroup";

/// The kernel's own bound (fs.nr_open), which is what containers get from other runtimes.
const MAX_OPEN_FILES: u64 = 1 << 20;

const NO_EXEC: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV).union(MsFlags::MS_NOEXEC);

/// Target, type, flags, data of each filesystem, in order.
const MOUNTS: [(&str, &str, MsFlags, &str); 7] = [
    ("/proc", "proc", NO_EXEC, ""),
    ("/sys", "sysfs", NO_EXEC, ""),
    ("/dev", "devtmpfs", MsFlags::MS_NOSUID, "mode=0755"),
    (
        "/dev/pts",
        "devpts",
        MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC),
        "ptmxmode=0666,gid=5,mode=620",
    ),
    ("/run", "tmpfs", MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV), "mode=0755"),
    ("/tmp", "tmpfs", MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV), "mode=1777"),
    (CGROUP_ROOT, "cgroup2", NO_EXEC, "nsdelegate"),
];

/// Makes the machine usable for containers.
pub fn prepare_machine() -> Result<()> {
    umask(Mode::from_bits_truncate(0o022));
    let _ = setsid();
    // Containers without a limit in their spec get the agent's; the kernel gives init only 4096.
    let _ = setrlimit(Resource::RLIMIT_NOFILE, MAX_OPEN_FILES, MAX_OPEN_FILES);
    make_root_pivotable().context(|| "making / a mount that pivot_root accepts".to_owned())?;
    for (target, fstype, flags, data) in MOUNTS {
        let _ = fs::create_dir_all(target);
        mount(Some(fstype), target, Some(fstype), flags, Some(data))
            .context(|| format!("mounting {fstype} on {target}"))?;
    }
    let _ = fs::create_dir_all("/dev/shm");
    if let Err(error) = mount(Some("tmpfs"), "/dev/shm", Some("tmpfs"), NO_EXEC, Some("mode=1777"))
    {
        warn!("mounting /dev/shm: {error}");
    }
    link_standard_streams();
    // Container start-up writes many short lines; the default limit would drop ours.
    let _ = fs::write("/proc/sys/kernel/printk_devkmsg", "on\n");
    // The kernel asks this program for modules, as it would ask modprobe.
    let _ = fs::write("/proc/sys/kernel/modprobe", "/init\n");
    // Memory that is plugged in later is used at once, and where there is enough for the kernel
    // itself, in a way that lets it be unplugged again.
    let _ = fs::write("/sys/module/memory_hotplug/parameters/online_policy", "auto-movable\n");
    let _ = fs::write("/sys/devices/system/memory/auto_online_blocks", "online\n");
    Ok(())
}

/// The initramfs root has no parent mount, and pivot_root refuses such a root. A bind of it, moved
/// over `/`, has one; containers then start without `--no-pivot` and can't see the agent's root.
///
/// The mount below, which the agent was executed from, becomes read-only: until a container's
/// process executes its program, its /proc/…/exe is the agent's. That the kernel lets nobody write
/// to a program that runs is no promise (Linux 6.11 did), and a mode or an owner it protects never.
fn make_root_pivotable() -> io::Result<()> {
    const STAGE: &str = "/.root";
    fs::create_dir_all(STAGE)?;
    mount(Some("/"), STAGE, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
    mount(None::<&str>, "/", None::<&str>, read_only, None::<&str>)?;
    chdir(STAGE)?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)?;
    chroot(".")?;
    chdir("/")?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_PRIVATE, None::<&str>)?;
    Ok(())
}

fn link_standard_streams() {
    for (link, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ] {
        if let Err(error) = symlink(target, link)
            && error.kind() != io::ErrorKind::AlreadyExists
        {
            warn!("linking {link}: {error}");
        }
    }
}

/// Lets children of `cgroup` use every controller that it has itself.
pub fn enable_controllers(cgroup: &str) -> io::Result<()> {
    let controllers = fs::read_to_string(format!("{cgroup}/cgroup.controllers"))?;
    let all: Vec<String> =
        controllers.split_ascii_whitespace().map(|name| format!("+{name}")).collect();
    let control = format!("{cgroup}/cgroup.subtree_control");
    if fs::write(&control, all.join(" ")).is_ok() {
        return Ok(());
    }
    // One controller that can't be enabled would keep all others from it.
    for controller in all {
        if let Err(error) = fs::write(&control, &controller) {
            warn!("{control}: {controller}: {error}");
        }
    }
    Ok(())
}

/// Turns the machine off; returns only if the kernel refuses.
pub fn power_off() {
    nix::unistd::sync();
    let Err(error) = nix::sys::reboot::reboot(nix::sys::reboot::RebootMode::RB_POWER_OFF);
    error!("power off: {error}");
}
