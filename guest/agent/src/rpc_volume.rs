//! RPCs on volumes and files: copies into the shared tree, volume sizes, termination logs.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::sys::statvfs::statvfs;

use crate::agent::Agent;
use crate::pb::grpc;
use crate::pb::grpc::volume_usage::Unit;
use crate::status::{Code, Context, Result, Status};
use crate::storage::mount_storage;
use crate::{copy_file, spec, warn};

/// Source: agent.proto GetDiagnosticData: at most 4096 bytes.
const MAX_LOG_BYTES: u64 = 4096;
/// Where volumes can be mounted in a guest.
const VOLUME_BASE: &str = "/run/kata-containers";

impl Agent {
    pub async fn copy_file(&self, request: grpc::CopyFileRequest) -> Result<()> {
        copy_file::copy(&request)
    }

    pub async fn get_volume_stats(
        &self,
        request: grpc::VolumeStatsRequest,
    ) -> Result<grpc::VolumeStatsResponse> {
        let path = volume_path(&request.volume_guest_path)?;
        let stats = statvfs(path).context(|| format!("statistics of {}", path.display()))?;
        let unit = stats.fragment_size();
        let bytes = |blocks: u64| blocks.saturating_mul(unit);
        Ok(grpc::VolumeStatsResponse {
            usage: vec![
                grpc::VolumeUsage {
                    available: bytes(stats.blocks_available()),
                    total: bytes(stats.blocks()),
                    used: bytes(stats.blocks().saturating_sub(stats.blocks_free())),
                    unit: Unit::Bytes as i32,
                },
                grpc::VolumeUsage {
                    available: stats.files_available(),
                    total: stats.files(),
                    used: stats.files().saturating_sub(stats.files_free()),
                    unit: Unit::Inodes as i32,
                },
            ],
            volume_condition: Some(grpc::VolumeCondition {
                abnormal: false,
                message: "OK".to_owned(),
            }),
        })
    }

    /// Grows the filesystem of a volume to its device, whose size is the host's business.
    pub async fn resize_volume(&self, request: grpc::ResizeVolumeRequest) -> Result<()> {
        let path = volume_path(&request.volume_guest_path)?;
        let tool = "/usr/sbin/resize2fs";
        if !Path::new(tool).exists() {
            return Err(Status::unimplemented("ResizeVolume: resize2fs is not in the guest image"));
        }
        let mounts =
            std::fs::read_to_string("/proc/self/mounts").context(|| "mounts".to_owned())?;
        let wanted = path.to_string_lossy();
        let device = mounts.lines().rev().find_map(|line| {
            let mut fields = line.split(' ');
            let device = fields.next()?;
            (fields.next()? == wanted).then(|| device.to_owned())
        });
        let device = device.ok_or_else(|| Status::not_found(format!("{wanted} is not mounted")))?;
        let mut command = Command::new(tool);
        command.arg(device).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let (_, exit) = self.reaper.spawn(&mut command).context(|| tool.to_owned())?;
        match exit.wait().await.0 {
            0 => Ok(()),
            code => Err(Status::internal(format!("resize2fs of {wanted} ended with {code}"))),
        }
    }

    /// What the container wrote to its termination log. The file is the container's, so it may be
    /// anything but what it should be.
    pub async fn get_diagnostic_data(
        &self,
        request: grpc::GetDiagnosticDataRequest,
    ) -> Result<grpc::GetDiagnosticDataResponse> {
        if request.log_type != "termination_log" {
            let text = format!("diagnostic log type {:?}", request.log_type);
            return Err(Status::unimplemented(text));
        }
        let container = self.container(&request.container_id)?;
        let data = match &container.termination_log {
            Some(path) => read_log(path)?,
            None => {
                let inside = Path::new(spec::TERMINATION_LOG.trim_start_matches('/'));
                copy_file::read_below(&container.rootfs, inside, MAX_LOG_BYTES)?
            }
        };
        Ok(grpc::GetDiagnosticDataResponse { data: String::from_utf8_lossy(&data).into_owned() })
    }

    /// Remounts tmpfs volumes whose size has changed.
    pub async fn update_ephemeral_mounts(
        &self,
        request: grpc::UpdateEphemeralMountsRequest,
    ) -> Result<()> {
        for mut storage in request.storages {
            if storage.driver != "ephemeral" {
                let text = format!("storage driver {:?} can't be updated", storage.driver);
                return Err(Status::new(Code::Unimplemented, text));
            }
            if !self.mounted.borrow().contains_key(&storage.mount_point) {
                let text = format!("{} is not mounted", storage.mount_point);
                return Err(Status::not_found(text));
            }
            storage.options.push("remount".to_owned());
            let source = storage.source.clone();
            mount_storage(&storage, &source)?;
        }
        Ok(())
    }

    /// Lets go of directory entries whose files the host has taken away.
    pub async fn remove_stale_virtiofs_share_mounts(
        &self,
        _: grpc::RemoveStaleVirtiofsShareMountsRequest,
    ) -> Result<()> {
        let base = Path::new(copy_file::SHARED_ROOT);
        let Ok(entries) = std::fs::read_dir(base) else { return Ok(()) };
        for entry in entries.flatten() {
            let path = entry.path();
            let Err(error) = std::fs::symlink_metadata(&path) else { continue };
            if error.raw_os_error() != Some(libc::ESTALE) {
                continue;
            }
            let flags = nix::mount::MntFlags::MNT_DETACH | nix::mount::MntFlags::UMOUNT_NOFOLLOW;
            if let Err(error) = nix::mount::umount2(&path, flags) {
                warn!("unmounting {}: {error}", path.display());
            }
        }
        Ok(())
    }
}

fn volume_path(path: &str) -> Result<&Path> {
    let path = Path::new(path);
    let plain = !path.components().any(|part| part == std::path::Component::ParentDir);
    if plain && path.starts_with(VOLUME_BASE) {
        return Ok(path);
    }
    Err(Status::invalid(format!("volume {} is not below {VOLUME_BASE}", path.display())))
}

fn read_log(path: &Path) -> Result<Vec<u8>> {
    let what = || format!("termination log {}", path.display());
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(path)
        .context(what)?;
    if !file.metadata().context(what)?.is_file() {
        return Err(Status::invalid(format!("{} is not a regular file", path.display())));
    }
    let mut data = Vec::new();
    file.take(MAX_LOG_BYTES).read_to_end(&mut data).context(what)?;
    Ok(data)
}
