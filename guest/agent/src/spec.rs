//! Changes a host's OCI spec into one for this guest.
//!
//! Source: kata agent protocol, "OCI spec as the agent wants it".

use std::path::{Component, Path, PathBuf};

use crate::cgroup::Cgroup;
use crate::container::Container;
use crate::pb::grpc::{
    LinuxDevice, LinuxDeviceCgroup, LinuxNamespace, LinuxResources, Mount, Process, Spec,
};
use crate::sandbox::Sandbox;
use crate::status::{Result, Status};

/// Kubernetes' default, used when a container says nothing else.
pub const TERMINATION_LOG: &str = "/dev/termination-log";
/// Files of /proc that a mount may cover. Source: kata agent protocol, same section.
const PROC_FILES: [&str; 8] =
    ["cpuinfo", "diskstats", "meminfo", "stat", "swaps", "uptime", "loadavg", "net/dev"];

/// Makes the spec fit the guest: shared namespaces, its cgroup, mounts that can be allowed.
pub fn adapt(spec: &mut Spec, cgroup: &Cgroup, sandbox: &Sandbox) -> Result<()> {
    let root = spec.root.as_ref().ok_or_else(|| Status::invalid("the spec has no root"))?;
    if !Path::new(&root.path).is_absolute() {
        return Err(Status::invalid(format!("root path {:?} is not absolute", root.path)));
    }
    for mount in &spec.mounts {
        check_mount(mount)?;
    }
    let process =
        spec.process.as_ref().ok_or_else(|| Status::invalid("the spec has no process"))?;
    if process.args.is_empty() {
        return Err(Status::invalid("the process has no arguments"));
    }
    let linux = spec.linux.get_or_insert_default();
    cgroup.name.clone_into(&mut linux.cgroups_path);
    linux.mount_label.clear();
    linux.intel_rdt = None;
    let devices = std::mem::take(&mut linux.devices);
    add_device_rules(&mut linux.resources.get_or_insert_default().devices, &devices);
    linux.devices = devices;
    adapt_namespaces(&mut linux.namespaces, sandbox);
    // In the sandbox's namespace the name is set once, by CreateSandbox.
    if sandbox.namespace("uts").is_some() {
        spec.hostname.clear();
    }
    Ok(())
}

/// The guest's network is the pod's; IPC and UTS are the sandbox's. For pids see `pids`.
fn adapt_namespaces(namespaces: &mut Vec<LinuxNamespace>, sandbox: &Sandbox) {
    namespaces.retain(|namespace| matches!(namespace.r#type.as_str(), "cgroup" | "user" | "mount"));
    for namespace in namespaces.iter_mut() {
        namespace.path.clear();
    }
    let mut add = |kind: &str, path: Option<String>| {
        namespaces.push(LinuxNamespace { r#type: kind.to_owned(), path: path.unwrap_or_default() });
    };
    add("ipc", sandbox.namespace("ipc"));
    add("uts", sandbox.namespace("uts"));
    if !namespaces.iter().any(|namespace| namespace.r#type == "mount") {
        namespaces.push(LinuxNamespace { r#type: "mount".to_owned(), path: String::new() });
    }
}

/// What every container may do with devices: make nodes of any, use the harmless ones and its ptys.
/// Source: OCI runtime-spec config-linux.md "Default Devices".
const DEFAULT_DEVICES: [(&str, i64, i64, &str); 11] = [
    ("c", -1, -1, "m"),
    ("b", -1, -1, "m"),
    ("c", 1, 3, "rwm"),
    ("c", 1, 5, "rwm"),
    ("c", 1, 7, "rwm"),
    ("c", 1, 8, "rwm"),
    ("c", 1, 9, "rwm"),
    ("c", 5, 0, "rwm"),
    ("c", 5, 1, "rwm"),
    ("c", 5, 2, "rwm"),
    ("c", 136, -1, "rwm"),
];

/// Without rules of the host's, everything is denied first: shims strip the rules, and a container
/// that can make nodes must not reach the guest's disks. Defaults and the spec's own devices follow.
fn add_device_rules(rules: &mut Vec<LinuxDeviceCgroup>, devices: &[LinuxDevice]) {
    let host_has_rules = !rules.is_empty();
    let mut add = |allow, kind: &str, major, minor, access: &str| {
        rules.push(LinuxDeviceCgroup {
            allow,
            r#type: kind.to_owned(),
            major,
            minor,
            access: access.to_owned(),
        });
    };
    if !host_has_rules {
        add(false, "a", -1, -1, "rwm");
    }
    for (kind, major, minor, access) in DEFAULT_DEVICES {
        add(true, kind, major, minor, access);
    }
    for device in devices.iter().filter(|device| device.r#type != "p") {
        add(true, &device.r#type, device.major, device.minor, "rwm");
    }
}

/// What `adapt` makes of a spec that says nothing of resources and devices.
pub fn default_resources() -> LinuxResources {
    let mut resources = LinuxResources::default();
    add_device_rules(&mut resources.devices, &[]);
    resources
}

fn check_mount(mount: &Mount) -> Result<()> {
    let destination = Path::new(&mount.destination);
    if !destination.is_absolute() {
        return Err(Status::invalid(format!("mount on {:?}: not absolute", mount.destination)));
    }
    if destination.components().any(|part| part == Component::ParentDir) {
        return Err(Status::invalid(format!("mount on {:?}: has ..", mount.destination)));
    }
    let Ok(below) = destination.strip_prefix("/proc") else { return Ok(()) };
    let whole = below.as_os_str().is_empty();
    let is_bind =
        mount.r#type == "bind" || mount.options.iter().any(|o| o == "bind" || o == "rbind");
    let source_is_proc = mount.source.starts_with("/proc");
    if whole && (!is_bind || source_is_proc) {
        return Ok(());
    }
    if is_bind && PROC_FILES.iter().any(|name| below == Path::new(name)) {
        return Ok(());
    }
    Err(Status::invalid(format!("mount on {:?}: /proc can't be covered", mount.destination)))
}

/// Fills in what exec requests of some shims leave out: they carry only terminal, user, arguments,
/// environment and directory. Source: kata agent protocol, "Exec fidelity gap".
pub fn complete_exec(mut process: Process, container: &Container) -> Process {
    let init = &container.init_spec;
    if process.capabilities.is_none() {
        process.capabilities.clone_from(&init.capabilities);
    }
    if process.rlimits.is_empty() {
        process.rlimits.clone_from(&init.rlimits);
    }
    process.no_new_privileges |= init.no_new_privileges;
    if process.oom_score_adj == 0 {
        process.oom_score_adj = init.oom_score_adj;
    }
    if process.cwd.is_empty() {
        process.cwd.clone_from(&init.cwd);
    }
    process
}

/// What the container's processes can ever be allowed.
pub fn bounding_capabilities(spec: &Spec) -> &[String] {
    let process = spec.process.as_ref();
    process.and_then(|process| process.capabilities.as_ref()).map_or(&[], |sets| &sets.bounding)
}

/// The guest's file behind the container's termination log, if a mount provides it.
pub fn termination_log(mounts: &[Mount]) -> Option<PathBuf> {
    let mount = mounts.iter().find(|mount| mount.destination == TERMINATION_LOG)?;
    Some(PathBuf::from(&mount.source))
}
