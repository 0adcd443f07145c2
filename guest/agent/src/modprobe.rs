//! Modules that are not in the image: from a directory that the host shows, when they are asked for.
//!
//! The directory is the list of what may be loaded: its content is the host's, read-only for every
//! guest, and any process can make the kernel ask. The kernel runs `modprobe -q -- ALIAS`, which is
//! this program. Source: modprobe(8), modules.dep(5).

use std::fs;
use std::path::{Path, PathBuf};

use crate::modules::{load_file, name_of};
use crate::status::{Context, Result};

/// In the share of every sandbox; no container's id begins with a dot.
const DIRECTORY: &str = "/run/kata-containers/shared/containers/.modules";
/// What the old firewall's programs need before they can ask for anything: they run a modprobe of
/// their own, which no container has.
const FIREWALL: [&str; 2] = ["ip_tables", "ip6_tables"];
const NET_ADMIN: &str = "CAP_NET_ADMIN";

/// The files that an alias or a name stands for, each after its dependencies.
struct Index {
    directory: PathBuf,
    aliases: String,
    dependencies: String,
}

impl Index {
    /// None if the host shows no modules of this kernel.
    fn open() -> Option<Self> {
        let release = fs::read_to_string("/proc/sys/kernel/osrelease").ok()?;
        let directory = Path::new(DIRECTORY).join(release.trim());
        let read = |name: &str| fs::read_to_string(directory.join(name)).ok();
        let (aliases, dependencies) = (read("modules.alias")?, read("modules.dep")?);
        Some(Self { directory, aliases, dependencies })
    }

    fn files(&self, wanted: &str) -> Vec<&str> {
        let wanted = wanted.replace('-', "_");
        let by_alias = self.aliases.lines().filter_map(|line| {
            let (alias, module) = line.split_once(' ')?;
            (alias == wanted).then_some(module)
        });
        let names: Vec<&str> = by_alias.chain([wanted.as_str()]).collect();
        let mut files = Vec::new();
        for line in self.dependencies.lines() {
            let Some((file, needed)) = line.split_once(':') else { continue };
            if !names.contains(&name_of(file).as_str()) {
                continue;
            }
            // The nearest stands first, the farthest last.
            files.extend(needed.split_ascii_whitespace().rev());
            files.push(file);
        }
        files
    }
}

/// Loads what a name or an alias stands for; false if there is no such module here.
pub fn load(alias: &str, parameters: &str) -> Result<bool> {
    let Some(index) = Index::open() else { return Ok(false) };
    let files = index.files(alias);
    for (number, file) in files.iter().enumerate() {
        // Parameters are for the module itself, which is the last.
        let own = if number + 1 == files.len() { parameters } else { "" };
        let path = index.directory.join(file);
        load_file(&path, own).context(|| format!("loading kernel module {file}"))?;
    }
    Ok(!files.is_empty())
}

/// Loads what a container with these capabilities may need and can't ask for.
pub fn prepare_for(capabilities: &[String]) {
    if !capabilities.iter().any(|name| name == NET_ADMIN) {
        return;
    }
    for name in FIREWALL {
        if let Err(status) = load(name, "") {
            crate::warn!("{status}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alias_stands_for_its_modules_with_their_dependencies_first() {
        let index = Index {
            directory: PathBuf::new(),
            aliases: "char_major_10_200 tun\ncrypto_stdrng drbg\ncrypto_stdrng ansi_cprng\n".into(),
            dependencies: "tun.ko:\nip6t_a.ko: x_tables.ko\niptable_nat.ko: nf_nat.ko nf_base.ko\n\
                           drbg.ko:\nansi_cprng.ko:\n"
                .into(),
        };
        assert_eq!(index.files("char-major-10-200"), ["tun.ko"]);
        assert_eq!(index.files("iptable-nat"), ["nf_base.ko", "nf_nat.ko", "iptable_nat.ko"]);
        assert_eq!(index.files("crypto-stdrng"), ["drbg.ko", "ansi_cprng.ko"]);
        assert!(index.files("tu").is_empty() && index.files("").is_empty());
    }
}
