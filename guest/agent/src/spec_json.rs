//! The OCI spec as the runtime wants it: config.json from the protocol's messages.
//!
//! A value at its protobuf default is one that the original config.json did not have.
//! Source: OCI runtime-spec config.md, config-linux.md; agent protocol oci.proto.

use std::collections::BTreeMap;

use crate::json::{Object, list};
use crate::pb::grpc;

/// Version of the runtime-spec that the written file claims.
const OCI_VERSION: &str = "1.0.2";

pub fn config(spec: &grpc::Spec) -> String {
    let mut out = Object::new();
    out.string("ociVersion", OCI_VERSION);
    if let Some(process) = &spec.process {
        out.raw("process", &self::process(process));
    }
    if let Some(root) = &spec.root {
        let mut object = Object::new();
        object.string("path", &root.path).boolean("readonly", root.readonly);
        out.raw("root", &object.finish());
    }
    out.string_if("hostname", &spec.hostname);
    out.raw("mounts", &each(&spec.mounts, mount));
    if let Some(hooks) = &spec.hooks {
        out.raw("hooks", &self::hooks(hooks));
    }
    if let Some(linux) = &spec.linux {
        out.raw("linux", &self::linux(linux));
    }
    out.finish()
}

fn each<T>(values: &[T], write: impl Fn(&T) -> String) -> String {
    list(&values.iter().map(write).collect::<Vec<_>>())
}

fn map(values: &BTreeMap<String, String>) -> String {
    let mut object = Object::new();
    for (key, value) in values {
        object.string(key, value);
    }
    object.finish()
}

pub fn process(process: &grpc::Process) -> String {
    let mut out = Object::new();
    out.boolean("terminal", process.terminal);
    if let Some(size) = &process.console_size {
        let mut object = Object::new();
        object.integer("height", size.height).integer("width", size.width);
        out.raw("consoleSize", &object.finish());
    }
    let user = process.user.clone().unwrap_or_default();
    let gids: Vec<String> = user.additional_gids.iter().map(ToString::to_string).collect();
    let mut object = Object::new();
    object.integer("uid", user.uid).integer("gid", user.gid).list_if("additionalGids", &gids);
    out.raw("user", &object.finish());
    out.strings_if("args", &process.args).strings_if("env", &process.env);
    out.string("cwd", if process.cwd.is_empty() { "/" } else { &process.cwd });
    if let Some(sets) = &process.capabilities {
        let mut object = Object::new();
        object
            .strings_if("bounding", &sets.bounding)
            .strings_if("effective", &sets.effective)
            .strings_if("inheritable", &sets.inheritable)
            .strings_if("permitted", &sets.permitted)
            .strings_if("ambient", &sets.ambient);
        out.raw("capabilities", &object.finish());
    }
    out.raw(
        "rlimits",
        &each(&process.rlimits, |limit| {
            let mut object = Object::new();
            object
                .string("type", &limit.r#type)
                .integer("hard", limit.hard)
                .integer("soft", limit.soft);
            object.finish()
        }),
    );
    out.boolean("noNewPrivileges", process.no_new_privileges);
    out.integer_if("oomScoreAdj", process.oom_score_adj);
    out.finish()
}

fn mount(mount: &grpc::Mount) -> String {
    let mut out = Object::new();
    out.string("destination", &mount.destination)
        .string_if("type", &mount.r#type)
        .string_if("source", &mount.source)
        .strings_if("options", &mount.options);
    out.finish()
}

fn hooks(hooks: &grpc::Hooks) -> String {
    let hook = |hook: &grpc::Hook| {
        let mut out = Object::new();
        out.string("path", &hook.path)
            .strings_if("args", &hook.args)
            .strings_if("env", &hook.env)
            .integer_if("timeout", hook.timeout);
        out.finish()
    };
    let mut out = Object::new();
    for (name, list) in [
        ("prestart", &hooks.prestart),
        ("createRuntime", &hooks.create_runtime),
        ("createContainer", &hooks.create_container),
        ("startContainer", &hooks.start_container),
        ("poststart", &hooks.poststart),
        ("poststop", &hooks.poststop),
    ] {
        if !list.is_empty() {
            out.raw(name, &each(list, hook));
        }
    }
    out.finish()
}

fn linux(linux: &grpc::Linux) -> String {
    let id_mapping = |mapping: &grpc::LinuxIdMapping| {
        let mut out = Object::new();
        out.integer("containerID", mapping.container_id)
            .integer("hostID", mapping.host_id)
            .integer("size", mapping.size);
        out.finish()
    };
    let mut out = Object::new();
    if !linux.uid_mappings.is_empty() {
        out.raw("uidMappings", &each(&linux.uid_mappings, id_mapping));
        out.raw("gidMappings", &each(&linux.gid_mappings, id_mapping));
    }
    if !linux.sysctl.is_empty() {
        out.raw("sysctl", &map(&linux.sysctl));
    }
    if let Some(resources) = &linux.resources {
        out.raw("resources", &self::resources(resources));
    }
    out.string_if("cgroupsPath", &linux.cgroups_path);
    out.raw(
        "namespaces",
        &each(&linux.namespaces, |namespace| {
            let mut out = Object::new();
            out.string("type", &namespace.r#type).string_if("path", &namespace.path);
            out.finish()
        }),
    );
    if !linux.devices.is_empty() {
        out.raw("devices", &each(&linux.devices, device));
    }
    if let Some(seccomp) = &linux.seccomp {
        out.raw("seccomp", &self::seccomp(seccomp));
    }
    out.string_if("rootfsPropagation", &linux.rootfs_propagation)
        .strings_if("maskedPaths", &linux.masked_paths)
        .strings_if("readonlyPaths", &linux.readonly_paths);
    out.finish()
}

fn device(device: &grpc::LinuxDevice) -> String {
    let mut out = Object::new();
    out.string("path", &device.path).string("type", &device.r#type);
    if device.r#type != "p" {
        out.integer("major", device.major).integer("minor", device.minor);
    }
    out.integer_if("fileMode", device.file_mode)
        .integer("uid", device.uid)
        .integer("gid", device.gid);
    out.finish()
}

fn resources(resources: &grpc::LinuxResources) -> String {
    let mut out = Object::new();
    if !resources.devices.is_empty() {
        out.raw("devices", &each(&resources.devices, device_rule));
    }
    if let Some(memory) = &resources.memory {
        let mut object = Object::new();
        object
            .integer_if("limit", memory.limit)
            .integer_if("reservation", memory.reservation)
            .integer_if("swap", memory.swap);
        out.raw("memory", &object.finish());
    }
    if let Some(cpu) = &resources.cpu {
        let mut object = Object::new();
        object
            .integer_if("shares", cpu.shares)
            .integer_if("quota", cpu.quota)
            .integer_if("period", cpu.period)
            .string_if("cpus", &cpu.cpus)
            .string_if("mems", &cpu.mems);
        out.raw("cpu", &object.finish());
    }
    if let Some(pids) = &resources.pids
        && pids.limit != 0
    {
        let mut object = Object::new();
        object.integer("limit", pids.limit);
        out.raw("pids", &object.finish());
    }
    if !resources.hugepage_limits.is_empty() {
        out.raw(
            "hugepageLimits",
            &each(&resources.hugepage_limits, |limit| {
                let mut out = Object::new();
                out.string("pageSize", &limit.pagesize).integer("limit", limit.limit);
                out.finish()
            }),
        );
    }
    out.finish()
}

/// In config.json a number that is not there means "any". The protocol has -1 for that, and shims
/// that copy an absent number send 0; no device has major number 0.
fn device_rule(rule: &grpc::LinuxDeviceCgroup) -> String {
    let mut out = Object::new();
    out.boolean("allow", rule.allow).string_if("type", &rule.r#type);
    if matches!(rule.r#type.as_str(), "b" | "c") && rule.major > 0 {
        out.integer("major", rule.major);
        if rule.minor >= 0 {
            out.integer("minor", rule.minor);
        }
    }
    out.string_if("access", &rule.access);
    out.finish()
}

fn seccomp(seccomp: &grpc::LinuxSeccomp) -> String {
    let mut out = Object::new();
    out.string("defaultAction", &seccomp.default_action)
        .strings_if("architectures", &seccomp.architectures)
        .strings_if("flags", &seccomp.flags);
    out.raw(
        "syscalls",
        &each(&seccomp.syscalls, |rule| {
            let mut out = Object::new();
            out.strings_if("names", &rule.names).string("action", &rule.action);
            if let Some(grpc::linux_syscall::ErrnoRet::Errnoret(errno)) = rule.errno_ret {
                out.integer("errnoRet", errno);
            }
            if !rule.args.is_empty() {
                out.raw(
                    "args",
                    &each(&rule.args, |arg| {
                        let mut out = Object::new();
                        out.integer("index", arg.index)
                            .integer("value", arg.value)
                            .integer("valueTwo", arg.value_two)
                            .string("op", &arg.op);
                        out.finish()
                    }),
                );
            }
            out.finish()
        }),
    );
    out.finish()
}
