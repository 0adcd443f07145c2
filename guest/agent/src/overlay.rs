//! Overlay storages: lower directories, and an upper and a work directory made on demand.

use std::fs;

use crate::pb::grpc::Storage;
use crate::status::{Context, Result};
use crate::storage::mount_storage;

/// Driver option that names a directory to make. Source: kata agent protocol, `overlayfs`.
const CREATE_DIRECTORY: &str = "io.katacontainers.volume.overlayfs.create_directory=";
const READ_WRITE: &str = "io.katacontainers.fs-opt.overlay-rw";
const UPPER_BASE: &str = "/run/sandbox-storage/overlay";

pub fn mount_overlay(storage: &Storage) -> Result<()> {
    let mut storage = storage.clone();
    for directory in
        storage.driver_options.iter().filter_map(|option| option.strip_prefix(CREATE_DIRECTORY))
    {
        fs::create_dir_all(directory).context(|| format!("making {directory}"))?;
    }
    let wants_upper = storage.options.iter().any(|option| option == READ_WRITE);
    storage.options.retain(|option| !option.starts_with("io.katacontainers."));
    if wants_upper {
        let name: String = storage
            .mount_point
            .chars()
            .map(|character| if character == '/' { '_' } else { character })
            .collect();
        for (option, directory) in [("upperdir", "upper"), ("workdir", "work")] {
            let path = format!("{UPPER_BASE}/{name}/{directory}");
            fs::create_dir_all(&path).context(|| format!("making {path}"))?;
            storage.options.push(format!("{option}={path}"));
        }
    }
    let source = if storage.source.is_empty() { "overlay" } else { &storage.source };
    mount_storage(&storage, source)
}
