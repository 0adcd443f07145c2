//! Kernel modules by name, with what they depend on, from the image's modules.dep.

use std::fs;

use nix::sys::utsname::uname;

use crate::boot::load_module;
use crate::status::{Context, Result, Status};

/// Loads a module after its dependencies. One that is built into the kernel is fine.
pub fn load_by_name(name: &str, parameters: &str) -> Result<()> {
    let valid = !name.is_empty()
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-".contains(&byte));
    if !valid {
        return Err(Status::invalid(format!("{name:?} is not the name of a kernel module")));
    }
    let kernel = uname().context(|| "uname".to_owned())?;
    let base = format!("/lib/modules/{}", kernel.release().to_string_lossy());
    if contains(&format!("{base}/modules.builtin"), name) {
        return Ok(());
    }
    let list = fs::read_to_string(format!("{base}/modules.dep")).unwrap_or_default();
    let line = list.lines().find(|line| is_named(line.split(':').next().unwrap_or(""), name));
    let Some((file, dependencies)) = line.and_then(|line| line.split_once(':')) else {
        return Err(Status::internal(format!("kernel module {name} is not in the guest image")));
    };
    // modules.dep lists the nearest dependency first.
    for dependency in dependencies.split_ascii_whitespace().rev() {
        load_module(&format!("{base}/{dependency}"), "")
            .context(|| format!("loading {dependency} for {name}"))?;
    }
    load_module(&format!("{base}/{file}"), parameters).context(|| format!("loading {name}"))
}

fn contains(file: &str, name: &str) -> bool {
    fs::read_to_string(file).is_ok_and(|text| text.lines().any(|line| is_named(line, name)))
}

/// Dashes and underscores are the same in a module's name.
fn is_named(path: &str, name: &str) -> bool {
    let file = path.rsplit('/').next().unwrap_or(path);
    let stem = file.split(".ko").next().unwrap_or(file);
    stem.replace('-', "_") == name.replace('-', "_")
}
