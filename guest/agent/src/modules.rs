//! Kernel modules: those that serving needs first, the rest as the machine turns out to need them.
//!
//! The image lists its modules in an order in which all could be loaded. In an emulated guest each
//! costs milliseconds on the way to a container, so drivers wait for their device and filesystems
//! for the first mount, which the kernel announces by running its `modprobe`: this program. What only
//! some workloads need is not in the image at all: see `modprobe`.

use std::cell::{Cell, OnceCell};
use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::path::Path;

use nix::kmod::{ModuleInitFlags, finit_module};

use crate::status::{Context, Result, Status};
use crate::{error, modprobe};

/// Absolute paths of modules, one a line, with parameters behind them if there are any.
const LIST: &str = "/etc/modules";
/// The last module without which nobody can talk to the agent.
const TRANSPORT: &str = "vmw_vsock_virtio_transport";
const VIRTIO_DEVICES: &str = "/sys/bus/virtio/devices";
const PCI_DEVICES: &str = "/sys/bus/pci/devices";
const PLATFORM_DEVICES: &str = "/sys/bus/platform/devices";

/// What makes a module worth loading.
#[derive(Clone, Copy, PartialEq)]
enum Need {
    /// A virtio device of this type. Source: virtio 1.2, "Device Types".
    Virtio(u32),
    /// A PCI device whose modalias begins so.
    Pci(&'static str),
    /// A device that the firmware's tables describe, by its ACPI id.
    Acpi(&'static str),
    /// Somebody asks the kernel for it.
    Request,
}

/// Any PCI device: a machine with such a bus has its virtio devices there.
const VIRTIO_BY_PCI: Need = Need::Pci("pci:");
const VIRTIO_BY_MMIO: Need = Need::Acpi("LNRO0005");
const PVPANIC_BY_PCI: Need = Need::Pci("pci:v00001B36d00000011");
const PVPANIC_BY_PORT: Need = Need::Acpi("QEMU0001");
/// Modules that wait, each for any of its needs. One that is not here is loaded at the start.
const ON_DEMAND: [(&str, Need); 20] = [
    ("virtio_pci_modern_dev", VIRTIO_BY_PCI),
    ("virtio_pci_legacy_dev", VIRTIO_BY_PCI),
    ("virtio_pci", VIRTIO_BY_PCI),
    ("virtio_mmio", VIRTIO_BY_MMIO),
    ("failover", Need::Virtio(1)),
    ("net_failover", Need::Virtio(1)),
    ("virtio_net", Need::Virtio(1)),
    ("virtio_blk", Need::Virtio(2)),
    ("virtio_rng", Need::Virtio(4)),
    ("virtio_balloon", Need::Virtio(5)),
    ("virtio_scsi", Need::Virtio(8)),
    ("virtio_mem", Need::Virtio(24)),
    ("fuse", Need::Virtio(26)),
    ("virtiofs", Need::Virtio(26)),
    ("virtio_pmem", Need::Virtio(27)),
    ("pvpanic", PVPANIC_BY_PCI),
    ("pvpanic", PVPANIC_BY_PORT),
    ("pvpanic_pci", PVPANIC_BY_PCI),
    ("pvpanic_mmio", PVPANIC_BY_PORT),
    ("overlay", Need::Request),
];

struct Entry<'a> {
    path: &'a str,
    parameters: &'a str,
}

fn entries(list: &str) -> impl Iterator<Item = Entry<'_>> {
    list.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')).map(
        |line| {
            let (path, parameters) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
            Entry { path, parameters: parameters.trim() }
        },
    )
}

/// A module's name as the kernel writes it.
pub fn name_of(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

fn needs_of(name: &str) -> impl Iterator<Item = Need> {
    ON_DEMAND.iter().filter(move |(known, _)| *known == name).map(|(_, need)| *need)
}

thread_local! {
    /// The kernel is the agent's: it is PID 1, or runs for the kernel of such a machine.
    static OWNED: Cell<bool> = const { Cell::new(false) };
}

/// Loads what the transport to the host needs. A list without it is loaded as far as it goes.
pub fn load_transport() {
    OWNED.with(|owned| owned.set(true));
    let list = fs::read_to_string(LIST).unwrap_or_default();
    let present = Present::default();
    for entry in entries(&list) {
        let name = name_of(entry.path);
        let mut needs = needs_of(&name).peekable();
        if needs.peek().is_none() || needs.any(|need| present.has(need)) {
            load_or_tell(&entry);
        }
        if name == TRANSPORT {
            return;
        }
    }
}

/// Devices that no request ever waits for.
const PATIENT: [Need; 4] = [Need::Virtio(4), Need::Virtio(5), PVPANIC_BY_PCI, PVPANIC_BY_PORT];

/// Loads what the machine's devices need before requests can use them; cheap when nothing is new.
pub fn load_for_devices() {
    load_where(|need| !PATIENT.contains(&need));
}

/// Loads what the machine's other devices need.
pub fn load_the_rest() {
    load_where(|need| PATIENT.contains(&need));
}

/// Loads what waits for a device that is there and `chosen`; what waits for none is always chosen.
fn load_where(chosen: impl Fn(Need) -> bool) {
    if !OWNED.with(Cell::get) {
        return;
    }
    let list = fs::read_to_string(LIST).unwrap_or_default();
    let present = Present::default();
    for entry in entries(&list) {
        let name = name_of(entry.path);
        let mut needs = needs_of(&name).peekable();
        if needs.peek().is_none() || needs.any(|need| chosen(need) && present.has(need)) {
            load_or_tell(&entry);
        }
    }
}

/// The machine's devices, read when first asked for.
#[derive(Default)]
struct Present {
    virtio: OnceCell<Vec<String>>,
    pci: OnceCell<Vec<String>>,
}

impl Present {
    fn has(&self, need: Need) -> bool {
        match need {
            VIRTIO_BY_PCI => !names(PCI_DEVICES).is_empty(),
            Need::Virtio(kind) => {
                let alias = format!("virtio:d{kind:08X}");
                let aliases = self.virtio.get_or_init(|| modaliases(VIRTIO_DEVICES));
                aliases.iter().any(|present| present.starts_with(&alias))
            }
            Need::Pci(alias) => {
                let aliases = self.pci.get_or_init(|| modaliases(PCI_DEVICES));
                aliases.iter().any(|present| present.starts_with(alias))
            }
            // Such a device is called by its id and a number.
            Need::Acpi(id) => names(PLATFORM_DEVICES).iter().any(|name| name.starts_with(id)),
            Need::Request => false,
        }
    }
}

fn names(directory: &str) -> Vec<String> {
    let Ok(devices) = fs::read_dir(directory) else { return Vec::new() };
    devices.flatten().filter_map(|device| device.file_name().into_string().ok()).collect()
}

fn modaliases(directory: &str) -> Vec<String> {
    let Ok(devices) = fs::read_dir(directory) else { return Vec::new() };
    devices.flatten().filter_map(|d| fs::read_to_string(d.path().join("modalias")).ok()).collect()
}

fn load_or_tell(entry: &Entry<'_>) {
    if let Err(error) = load(entry.path, entry.parameters) {
        error!("module {}: {error}", entry.path);
    }
}

/// Loads one module file; a module that is already there is fine. The file is then only memory that
/// the pod could use, because the image is unpacked in memory.
fn load(path: &str, parameters: &str) -> io::Result<()> {
    load_file(Path::new(path), parameters)?;
    let _ = fs::remove_file(path);
    Ok(())
}

/// Loads one module file; a module that is already there is fine.
pub fn load_file(path: &Path, parameters: &str) -> io::Result<()> {
    if Path::new("/sys/module").join(name_of(&path.to_string_lossy())).exists() {
        return Ok(());
    }
    let file = File::open(path)?;
    let parameters = CString::new(parameters)?;
    match finit_module(file, &parameters, ModuleInitFlags::empty()) {
        Ok(()) | Err(nix::errno::Errno::EEXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Loads a module by its name or the kernel's alias (`fs-overlay`): one of the image, after those
/// listed before it that wait for the same thing, or one of the host's directory.
pub fn load_by_name(alias: &str, parameters: &str) -> Result<()> {
    let name = alias.strip_prefix("fs-").unwrap_or(alias).replace('-', "_");
    let list = fs::read_to_string(LIST).context(|| LIST.to_owned())?;
    let needs: Vec<Need> = needs_of(&name).collect();
    for entry in entries(&list) {
        let listed = name_of(entry.path);
        let what = || format!("loading kernel module {listed}");
        if listed == name {
            let own = if parameters.is_empty() { entry.parameters } else { parameters };
            return load(entry.path, own).context(what);
        }
        if needs_of(&listed).any(|need| needs.contains(&need)) {
            load(entry.path, entry.parameters).context(what)?;
        }
    }
    if Path::new("/sys/module").join(&name).exists() || modprobe::load(alias, parameters)? {
        return Ok(());
    }
    Err(Status::not_found(format!("kernel module {alias:?} is not among the guest's")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn list_has_paths_parameters_and_comments() {
        let list = "# order kept\n/lib/modules/virtio-rng.ko\n\n/lib/a_b.ko.xz x=1 y=2\n";
        let read: Vec<_> =
            entries(list).map(|entry| (name_of(entry.path), entry.parameters)).collect();
        assert_eq!(read, [("virtio_rng".to_owned(), ""), ("a_b".to_owned(), "x=1 y=2")]);
        assert!(needs_of("virtio_rng").any(|need| need == Need::Virtio(4)));
        assert_eq!((needs_of("pvpanic").count(), needs_of("a_b").count()), (2, 0));
    }
}
