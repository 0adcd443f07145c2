//! RPCs on containers: create, start, pause, update, remove.

use std::cell::{OnceCell, RefCell};
use std::fs;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use tokio::sync::Mutex;

use crate::agent::Agent;
use crate::cgroup::Cgroup;
use crate::container::{Container, Process, check_id};
use crate::pb::grpc;
use crate::pids::{self, ProcMount};
use crate::rpc_process::refuse_raw_ports;
use crate::settle::Stage;
use crate::status::{Code, Context, Result, Status};
use crate::submount::Submount;
use crate::{devices, info, modprobe, native, spec};

/// Source: kata agent protocol, "OCI spec as the agent wants it".
pub const CONTAINER_BASE: &str = "/run/kata-containers";

impl Agent {
    pub async fn create_container(&self, request: grpc::CreateContainerRequest) -> Result<()> {
        let id = request.container_id.clone();
        check_id(&id)?;
        self.settling.wait_for(Stage::Complete).await;
        refuse_raw_ports([request.stdin_port, request.stdout_port, request.stderr_port])?;
        if self.containers.borrow().contains_key(&id) || !self.sandbox.borrow_mut().reserve(&id) {
            return Err(Status::new(Code::AlreadyExists, format!("container {id} already exists")));
        }
        let bundle = Path::new(CONTAINER_BASE).join(&id);
        let mut storages = Vec::new();
        let made = self.make_container(request, &bundle, &mut storages).await;
        self.sandbox.borrow_mut().unreserve(&id);
        match made {
            Ok(container) => {
                self.oom.watch(&container);
                self.sandbox.borrow_mut().first_container.get_or_insert(id.clone());
                self.containers.borrow_mut().insert(id.clone(), container);
                info!("container {id} created");
                Ok(())
            }
            Err(status) => {
                let _ = native::delete(&Cgroup::of_container(&id), None).await;
                self.release_storages(&storages);
                let _ = fs::remove_dir_all(&bundle);
                Err(status)
            }
        }
    }

    async fn make_container(
        &self,
        request: grpc::CreateContainerRequest,
        bundle: &Path,
        storages: &mut Vec<String>,
    ) -> Result<Rc<Container>> {
        let id = request.container_id;
        let mut spec = request.oci.ok_or_else(|| Status::invalid("no OCI spec"))?;
        self.add_storages(&request.storages, storages).await?;
        fs::create_dir_all(bundle).context(|| format!("making {}", bundle.display()))?;
        devices::resolve(&request.devices, &mut spec, self.config.hotplug_timeout).await?;
        let cgroup = Cgroup::of_container(&id);
        spec::adapt(&mut spec, &cgroup, &self.sandbox.borrow())?;
        let root = spec.root.as_ref().map(|root| Submount::meet(&root.path)).transpose()?.flatten();
        let joins = self.pids_to_join(&spec, request.sandbox_pidns)?;
        if let Some(hooks) = &spec.hooks {
            native::check_hooks(hooks)?;
        }
        let terminal = spec.process.as_ref().is_some_and(|process| process.terminal);
        let hook_state = native::hook_state(&id, &bundle.to_string_lossy());
        let bounding = spec::bounding_capabilities(&spec);
        self.note_capabilities(bounding);
        if self.is_init {
            modprobe::prepare_for(bounding);
        }
        let blueprint = native::Blueprint {
            spec: &spec,
            hook_state: &hook_state,
            cgroup: &cgroup,
            joins: joins.as_ref(),
            may_be_joined: joins.is_none() && pids::may_be_joined(&spec),
        };
        let (mut waiting, mut proc) = (None, None);
        let ((pid, exit), io) = self
            .launch(terminal, async |io| {
                let made = native::create(&self.reaper, &blueprint, io).await;
                made.map(|(mut launched, held)| {
                    waiting = Some(held);
                    proc = launched.proc.take();
                    launched
                })
            })
            .await?;
        let init_spec = spec.process.take().unwrap_or_default();
        Ok(Rc::new(Container {
            id,
            waiting: waiting.unwrap_or_default(),
            bundle: bundle.to_owned(),
            cgroup,
            init: Rc::new(Process { pid, exit, io, waited: OnceCell::new() }),
            execs: RefCell::default(),
            storages: std::mem::take(storages),
            init_spec,
            proc: ProcMount::new(proc),
            own_users: native::has_own_users(&spec),
            seccomp: spec.linux.and_then(|linux| linux.seccomp),
            rootfs: PathBuf::from(spec.root.unwrap_or_default().path),
            root: RefCell::new(root),
            termination_log: spec::termination_log(&spec.mounts),
            started: false.into(),
            changing: Mutex::new(()),
        }))
    }

    pub async fn start_container(&self, request: grpc::StartContainerRequest) -> Result<()> {
        let container = self.container(&request.container_id)?;
        let _changing = container.changing.lock().await;
        if container.started.get() {
            let text = format!("container {} has been started already", container.id);
            return Err(Status::new(Code::FailedPrecondition, text));
        }
        native::start(&container.waiting).await?;
        container.started.set(true);
        Ok(())
    }

    pub async fn pause_container(&self, request: grpc::PauseContainerRequest) -> Result<()> {
        let container = self.container(&request.container_id)?;
        let _changing = container.changing.lock().await;
        native::freeze(&container.cgroup, true).await
    }

    pub async fn resume_container(&self, request: grpc::ResumeContainerRequest) -> Result<()> {
        let container = self.container(&request.container_id)?;
        let _changing = container.changing.lock().await;
        native::freeze(&container.cgroup, false).await
    }

    pub async fn update_container(&self, request: grpc::UpdateContainerRequest) -> Result<()> {
        let container = self.container(&request.container_id)?;
        let _changing = container.changing.lock().await;
        let resources = request.resources.ok_or_else(|| Status::invalid("no resources"))?;
        native::limits::apply(&container.cgroup, &resources)
    }

    /// Kills what still runs; a timeout of 0 waits as long as that takes.
    pub async fn remove_container(&self, request: grpc::RemoveContainerRequest) -> Result<()> {
        let removal = self.remove(&request.container_id);
        if request.timeout == 0 {
            return removal.await;
        }
        let limit = Duration::from_secs(request.timeout.into());
        tokio::time::timeout(limit, removal).await.unwrap_or_else(|_| {
            let text = format!("removing container {} took too long", request.container_id);
            Err(Status::new(Code::DeadlineExceeded, text))
        })
    }

    async fn remove(&self, id: &str) -> Result<()> {
        let container = self.container(id)?;
        // At once: who holds the lock may be waiting for a process that hangs. What fails here fails
        // again below, and is told there.
        let _ = container.cgroup.kill();
        let _changing = container.changing.lock().await;
        self.oom.forget(id);
        let init = &container.init;
        native::delete(&container.cgroup, init.exit.get().is_none().then_some(init.pid)).await?;
        init.exit.wait().await;
        drop(container.root.take());
        container.proc.release();
        self.containers.borrow_mut().remove(id);
        self.release_storages(&container.storages);
        if let Err(error) = fs::remove_dir_all(&container.bundle) {
            crate::warn!("removing {}: {error}", container.bundle.display());
        }
        info!("container {id} removed");
        Ok(())
    }
}
