//! Finds a block device by what the host knows of it, and waits for a hot-plugged one.
//!
//! The kernel's uevents only wake the search up; sysfs decides.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, socket,
};

use crate::io::Pollable;
use crate::modules;
use crate::pb::grpc::Storage;
use crate::status::{Code, Context, Result, Status};

const PCI_ROOT: &str = "/sys/devices/pci0000:00";
/// What Firecracker's slots show while they are empty. The kernel tells of the change to a disk's
/// size by an uevent, unless it was 0. Source: Linux v6.1, block/genhd.c set_capacity_and_notify.
const EMPTY_SLOT_SECTORS: u64 = 1;
const SCSI_DEVICES: &str = "/sys/class/scsi_device";

/// The node in /dev of a `blk`, `scsi` or `mmioblk` storage.
pub async fn find(storage: &Storage, timeout: Duration) -> Result<String> {
    let source = storage.source.clone();
    match storage.driver.as_str() {
        "blk" if !source.starts_with("/dev/") => by_pci_path(&source, timeout).await,
        "scsi" => by_scsi_address(&source, timeout).await,
        _ => by_node(&source, timeout).await,
    }
}

/// A disk by its chain of PCI slots, such as `02/03`.
pub async fn by_pci_path(path: &str, timeout: Duration) -> Result<String> {
    let slots = parse_pci_path(path)?;
    let look = || {
        node_below(&pci_device(&slots)?.join("block"))
            .or_else(|| pci_device(&slots).and_then(|device| node_of_virtio(&device)))
    };
    wait_for(&format!("a block device at PCI path {path}"), timeout, look).await
}

/// A disk by `bus:lun` style address; only the LUN varies between disks of one controller.
pub async fn by_scsi_address(address: &str, timeout: Duration) -> Result<String> {
    let (target, lun) = address
        .split_once(':')
        .and_then(|(target, lun)| Some((target.parse::<u32>().ok()?, lun.parse::<u32>().ok()?)))
        .ok_or_else(|| Status::invalid(format!("{address:?} is not a SCSI address")))?;
    rescan_scsi(target, lun);
    let suffix = format!(":0:{target}:{lun}");
    let look = || {
        let entries = fs::read_dir(SCSI_DEVICES).ok()?;
        let entry =
            entries.flatten().find(|e| e.file_name().to_string_lossy().ends_with(&suffix))?;
        node_below(&entry.path().join("device/block"))
    };
    wait_for(&format!("a disk at SCSI address {address}"), timeout, look).await
}

/// A disk by its node's name, which the host can know for some machines.
pub async fn by_node(node: &str, timeout: Duration) -> Result<String> {
    let plain = node
        .strip_prefix("/dev/")
        .is_some_and(|name| name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-'));
    if !plain {
        return Err(Status::invalid(format!("{node:?} is not a device node")));
    }
    let look = || (Path::new(node).exists() && is_filled(node)).then(|| node.to_owned());
    wait_for(node, timeout, look).await
}

/// Whether a disk is in a slot that may have been there, empty, since the machine's start. What is
/// no disk has no size and counts as filled.
fn is_filled(node: &str) -> bool {
    let name = node.trim_start_matches("/dev/");
    match fs::read_to_string(format!("/sys/class/block/{name}/size")) {
        Ok(sectors) => sectors.trim().parse::<u64>().map_or(true, |n| n > EMPTY_SLOT_SECTORS),
        Err(_) => true,
    }
}

fn rescan_scsi(target: u32, lun: u32) {
    let Ok(hosts) = fs::read_dir("/sys/class/scsi_host") else { return };
    for host in hosts.flatten() {
        // A disk that is there already is found without it, so a failure shows as a timeout.
        let _ = fs::write(host.path().join("scan"), format!("0 {target} {lun}\n"));
    }
}

/// Slot and function of each step. Source: kata agent protocol, driver `blk`: `02/03`, slot[.func].
pub fn parse_pci_path(path: &str) -> Result<Vec<(u8, u8)>> {
    let step = |text: &str| {
        let (slot, function) = text.split_once('.').unwrap_or((text, "0"));
        let slot = u8::from_str_radix(slot, 16).ok().filter(|slot| *slot < 32)?;
        let function = u8::from_str_radix(function, 16).ok().filter(|function| *function < 8)?;
        Some((slot, function))
    };
    let steps: Option<Vec<_>> = path.split('/').map(step).collect();
    steps
        .filter(|steps| steps.len() <= 8)
        .ok_or_else(|| Status::invalid(format!("{path:?} is not a PCI path")))
}

/// Directory in sysfs of the device at the end of the chain; every step but the last is a bridge.
pub fn pci_device(slots: &[(u8, u8)]) -> Option<PathBuf> {
    let mut directory = PathBuf::from(PCI_ROOT);
    let mut bus = "0000:00".to_owned();
    for (index, (slot, function)) in slots.iter().enumerate() {
        directory.push(format!("{bus}:{slot:02x}.{function}"));
        if index + 1 < slots.len() {
            let mut buses = fs::read_dir(directory.join("pci_bus")).ok()?;
            bus = buses.next()?.ok()?.file_name().to_string_lossy().into_owned();
        }
    }
    directory.exists().then_some(directory)
}

fn node_of_virtio(device: &Path) -> Option<String> {
    let mut entries = fs::read_dir(device).ok()?.flatten();
    let virtio = entries.find(|entry| entry.file_name().to_string_lossy().starts_with("virtio"))?;
    node_below(&virtio.path().join("block"))
}

/// The node of the only disk that a `block` directory names.
fn node_below(directory: &Path) -> Option<String> {
    let entry = fs::read_dir(directory).ok()?.next()?.ok()?;
    let node = format!("/dev/{}", entry.file_name().to_string_lossy());
    Path::new(&node).exists().then_some(node)
}

/// Repeats `look` at every uevent until it finds something or the time is over.
pub async fn wait_for<T>(
    what: &str,
    timeout: Duration,
    mut look: impl FnMut() -> Option<T>,
) -> Result<T> {
    if let Some(found) = look() {
        return Ok(found);
    }
    let events = uevents().context(|| "listening for uevents".to_owned())?;
    let search = async {
        let mut event = [0; 4096];
        loop {
            modules::load_for_devices();
            if let Some(found) = look() {
                return Ok(found);
            }
            // An overrun loses events, which only means to look again.
            match events.read(&mut event).await {
                Err(error) if error.raw_os_error() != Some(libc::ENOBUFS) => return Err(error),
                _ => {}
            }
        }
    };
    match tokio::time::timeout(timeout, search).await {
        Ok(found) => found.context(|| what.to_owned()),
        Err(_) => Err(Status::new(
            Code::DeadlineExceeded,
            format!("{what} did not appear within {} s", timeout.as_secs()),
        )),
    }
}

fn uevents() -> io::Result<Pollable> {
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        SockProtocol::NetlinkKObjectUEvent,
    )?;
    // Group 1 is the kernel's own. Source: netlink(7), NETLINK_KOBJECT_UEVENT.
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 1))?;
    Pollable::new(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pci_paths_are_chains_of_hex_slots() {
        assert_eq!(parse_pci_path("02").unwrap(), [(2, 0)]);
        assert_eq!(parse_pci_path("02/1f.7").unwrap(), [(2, 0), (31, 7)]);
        for bad in ["", "/", "20", "02/", "zz", "02.8", "../02", "1/1/1/1/1/1/1/1/1"] {
            assert!(parse_pci_path(bad).is_err(), "{bad}");
        }
    }
}
