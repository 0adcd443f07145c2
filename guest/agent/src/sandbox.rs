//! The sandbox: what its containers share, and its end.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::rc::Rc;
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::sethostname;

use crate::agent::Agent;
use crate::container::check_id;
use crate::pb::grpc;
use crate::settle::Stage;
use crate::status::{Code, Context, Result, Status};
use crate::{boot, info, warn};

/// Namespaces that outlive every container are kept by a mount here.
pub const NAMESPACE_DIR: &str = "/run/sandbox-ns";
/// Source: kata agent protocol, "Env/hostname".
const RESOLV_CONF: &str = "/run/kata-containers/sandbox/resolv.conf";
/// Source: sethostname(2), HOST_NAME_MAX.
const MAX_HOSTNAME_BYTES: usize = 64;
/// The reply to DestroySandbox leaves before the machine goes.
const POWEROFF_DELAY: Duration = Duration::from_millis(20);

#[derive(Default)]
pub struct Sandbox {
    pub id: String,
    /// The sandbox's own container, whose pid namespace others may share.
    pub first_container: Option<String>,
    pub guest_hook_path: String,
    has_namespaces: bool,
    storages: Vec<String>,
    /// Containers that are being created.
    reserved: BTreeSet<String>,
}

impl Sandbox {
    /// Claims an id for a container in the making; false if somebody else makes it.
    pub fn reserve(&mut self, id: &str) -> bool {
        self.reserved.insert(id.to_owned())
    }

    pub fn unreserve(&mut self, id: &str) {
        self.reserved.remove(id);
    }

    /// Path of a shared namespace ("ipc", "uts"), if the sandbox has made them.
    pub fn namespace(&self, kind: &str) -> Option<String> {
        self.has_namespaces.then(|| format!("{NAMESPACE_DIR}/{kind}"))
    }
}

impl Agent {
    pub async fn create_sandbox(&self, request: grpc::CreateSandboxRequest) -> Result<()> {
        if !request.sandbox_id.is_empty() {
            check_id(&request.sandbox_id)?;
        }
        self.settling.wait_for(Stage::Devices).await;
        if self.sandbox.borrow().has_namespaces {
            return Err(Status::new(Code::AlreadyExists, "the sandbox already exists"));
        }
        make_namespaces(&request.hostname)?;
        {
            let mut sandbox = self.sandbox.borrow_mut();
            sandbox.id = request.sandbox_id;
            sandbox.has_namespaces = true;
            sandbox.guest_hook_path = request.guest_hook_path;
        }
        if let Err(error) = write_resolv_conf(&request.dns, self.is_init) {
            warn!("resolv.conf: {error}");
        }
        let mut storages = Vec::new();
        let added = self.add_storages(&request.storages, &mut storages).await;
        self.sandbox.borrow_mut().storages.extend(storages);
        added?;
        // After the storages: one of them holds the modules that are not in the image.
        for module in request.kernel_modules.iter().filter(|_| self.is_init) {
            crate::modules::load_by_name(&module.name, &module.parameters.join(" "))?;
        }
        info!("sandbox created");
        Ok(())
    }

    /// Ends every container, and as PID 1 the machine with them.
    pub async fn destroy_sandbox(self: &Rc<Self>, _: grpc::DestroySandboxRequest) -> Result<()> {
        self.ending.set(true);
        let ids: Vec<String> = self.containers.borrow().keys().cloned().collect();
        for container_id in ids {
            let request = grpc::RemoveContainerRequest { container_id, timeout: 5 };
            if let Err(status) = self.remove_container(request).await {
                warn!("{status}");
            }
        }
        let storages = std::mem::take(&mut self.sandbox.borrow_mut().storages);
        self.release_storages(&storages);
        drop_namespaces();
        *self.sandbox.borrow_mut() = Sandbox::default();
        let agent = self.clone();
        tokio::task::spawn_local(async move {
            tokio::time::sleep(POWEROFF_DELAY).await;
            if agent.is_init {
                boot::power_off();
            }
            std::process::exit(0);
        });
        Ok(())
    }
}

/// Makes the UTS and IPC namespaces, keeps them by a mount each, and steps back out of them.
fn make_namespaces(hostname: &str) -> Result<()> {
    let make = || -> io::Result<()> {
        fs::create_dir_all(NAMESPACE_DIR)?;
        let own = [("uts", CloneFlags::CLONE_NEWUTS), ("ipc", CloneFlags::CLONE_NEWIPC)];
        let kept = own
            .iter()
            .map(|(name, kind)| Ok((File::open(format!("/proc/self/ns/{name}"))?, *kind)))
            .collect::<io::Result<Vec<_>>>()?;
        unshare(CloneFlags::CLONE_NEWUTS | CloneFlags::CLONE_NEWIPC)?;
        let inside = || -> io::Result<()> {
            if !hostname.is_empty() {
                let end = hostname.len().min(MAX_HOSTNAME_BYTES);
                sethostname(String::from_utf8_lossy(&hostname.as_bytes()[..end]).as_ref())?;
            }
            for (name, _) in own {
                bind_file(&format!("/proc/self/ns/{name}"), &format!("{NAMESPACE_DIR}/{name}"))?;
            }
            Ok(())
        };
        let result = inside();
        for (namespace, kind) in kept {
            setns(namespace, kind)?;
        }
        result
    };
    make().context(|| "making the sandbox's namespaces".to_owned())
}

fn drop_namespaces() {
    for name in ["uts", "ipc"] {
        let path = format!("{NAMESPACE_DIR}/{name}");
        let _ = umount2(path.as_str(), MntFlags::MNT_DETACH);
        let _ = fs::remove_file(path);
    }
}

fn bind_file(source: &str, target: &str) -> io::Result<()> {
    File::create(target)?;
    mount(Some(source), target, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    Ok(())
}

fn write_resolv_conf(lines: &[String], bind: bool) -> io::Result<()> {
    if lines.is_empty() {
        return Ok(());
    }
    if let Some(dir) = std::path::Path::new(RESOLV_CONF).parent() {
        fs::create_dir_all(dir)?;
    }
    fs::write(RESOLV_CONF, lines.join("\n") + "\n")?;
    if bind {
        bind_file(RESOLV_CONF, "/etc/resolv.conf")?;
    }
    Ok(())
}
