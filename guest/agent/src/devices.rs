//! Devices of a container: the guest's own node for each that the host names.
//!
//! The spec holds the host's numbers; the guest's replace them. Source: kata agent protocol,
//! "Storage drivers and device types".

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::time::Duration;

use nix::sys::stat::{major, minor};

use crate::block;
use crate::pb::grpc::{Device, LinuxDevice, Spec};
use crate::status::{Context, Result, Status};

/// Types that `GetGuestDetails` names.
pub const HANDLERS: [&str; 5] = ["blk", "mmioblk", "nvdimm", "scsi", "vfio-pci-gk"];

/// Waits for every device and writes the guest's numbers into the spec.
pub async fn resolve(devices: &[Device], spec: &mut Spec, timeout: Duration) -> Result<()> {
    for device in devices {
        let node = find(device, timeout).await.map_err(|status| {
            Status::new(status.code, format!("device {} {}: {status}", device.r#type, device.id))
        })?;
        if let Some(node) = node.filter(|_| !device.container_path.is_empty()) {
            renumber(spec, device, &node)?;
        }
    }
    Ok(())
}

/// The node of a device, or none if it has no node of its own.
async fn find(device: &Device, timeout: Duration) -> Result<Option<String>> {
    match device.r#type.as_str() {
        "blk" if device.vm_path.is_empty() => {
            block::by_pci_path(&device.id, timeout).await.map(Some)
        }
        "scsi" if device.vm_path.is_empty() => {
            block::by_scsi_address(&device.id, timeout).await.map(Some)
        }
        "blk" | "scsi" | "mmioblk" | "nvdimm" => {
            block::by_node(&device.vm_path, timeout).await.map(Some)
        }
        "vfio-pci-gk" => {
            for option in &device.options {
                // "host address=path in the guest"
                let path = option.split_once('=').map_or(option.as_str(), |(_, path)| path);
                let slots = block::parse_pci_path(path)?;
                let what = format!("a PCI device at {path}");
                block::wait_for(&what, timeout, || block::pci_device(&slots)).await?;
            }
            Ok(None)
        }
        other => Err(Status::unimplemented(format!(
            "device type {other:?}; this agent has {}",
            HANDLERS.join(", ")
        ))),
    }
}

fn renumber(spec: &mut Spec, device: &Device, node: &str) -> Result<()> {
    let status = fs::metadata(node).context(|| node.to_owned())?;
    let kind = if status.file_type().is_block_device() { "b" } else { "c" };
    let number = |value: u64| i64::try_from(value).context(|| node.to_owned());
    let (major, minor) = (number(major(status.rdev()))?, number(minor(status.rdev()))?);
    let devices = &mut spec.linux.get_or_insert_default().devices;
    let path = &device.container_path;
    match devices.iter_mut().find(|listed| listed.path == *path) {
        Some(listed) => {
            kind.clone_into(&mut listed.r#type);
            (listed.major, listed.minor) = (major, minor);
        }
        None => devices.push(LinuxDevice {
            path: path.clone(),
            r#type: kind.to_owned(),
            major,
            minor,
            file_mode: 0o660,
            ..LinuxDevice::default()
        }),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listed_device_gets_the_number_of_the_guests_node() {
        let mut spec = Spec::default();
        let listed =
            LinuxDevice { path: "/dev/x".into(), major: 8, minor: 7, ..LinuxDevice::default() };
        spec.linux.get_or_insert_default().devices.push(listed);
        for path in ["/dev/x", "/dev/y"] {
            let device = Device { container_path: path.into(), ..Device::default() };
            renumber(&mut spec, &device, "/dev/null").unwrap();
        }
        let got: Vec<_> = spec.linux.unwrap().devices.iter().map(|d| (d.major, d.minor)).collect();
        assert_eq!(got, [(1, 3), (1, 3)]);
    }
}
