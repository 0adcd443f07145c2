//! RPCs on processes: exec, signals, exit statuses, standard streams.

use std::cell::OnceCell;
use std::rc::Rc;
use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::sync::oneshot;

use crate::agent::Agent;
use crate::container::{Container, Process, check_id};
use crate::native::{Launched, ProcessIo};
use crate::pb::grpc;
use crate::status::{Code, Context, Result, Status};
use crate::stdio::{Output, Stdio, make_pipes};
use crate::{native, spec};

/// How long the record of an ended exec waits for somebody to fetch its output.
const KEEP_ENDED: Duration = Duration::from_secs(30);

impl Agent {
    pub async fn exec_process(&self, request: grpc::ExecProcessRequest) -> Result<()> {
        check_id(&request.exec_id)?;
        let container = self.container(&request.container_id)?;
        refuse_raw_ports([request.stdin_port, request.stdout_port, request.stderr_port])?;
        let wanted = request.process.ok_or_else(|| Status::invalid("no process to execute"))?;
        let process = spec::complete_exec(wanted, &container);
        let _changing = container.changing.lock().await;
        if container.init.exit.get().is_some() {
            // Its pid may be another's by now, and nothing awaits between here and the clone.
            let text = format!("container {} has ended", container.id);
            return Err(Status::new(Code::FailedPrecondition, text));
        }
        if container.cgroup.is_frozen() {
            let text = format!("container {} is paused", container.id);
            return Err(Status::new(Code::FailedPrecondition, text));
        }
        container.admit_exec(&request.exec_id)?;
        let sets = process.capabilities.as_ref();
        self.note_capabilities(sets.map_or(&[], |sets| &sets.bounding));
        let (launched, io) = self
            .launch(process.terminal, async |io| {
                let init = native::Init {
                    pid: container.init.pid,
                    own_users: container.own_users,
                    is_watched: self.has_tracers.get(),
                };
                let (seccomp, cgroup) = (container.seccomp.as_ref(), &container.cgroup);
                native::exec(&self.reaper, &process, seccomp, init, cgroup, io).await
            })
            .await?;
        let record = Process { pid: launched.0, exit: launched.1, io, waited: OnceCell::new() };
        container.execs.borrow_mut().insert(request.exec_id, Rc::new(record));
        Ok(())
    }

    /// Makes the streams, lets `start` make the process, and joins the two.
    pub async fn launch(
        &self,
        terminal: bool,
        start: impl AsyncFnOnce(ProcessIo) -> Result<Launched>,
    ) -> Result<((i32, Rc<crate::reaper::Exit>), Stdio)> {
        if terminal {
            let launched = start(ProcessIo::Terminal).await?;
            let master = launched.terminal.ok_or_else(|| Status::internal("no tty"))?;
            let io = Stdio::terminal(master, &launched.exit);
            return Ok(((launched.pid, launched.exit), io));
        }
        let (pipes, ends) = make_pipes(self.config.container_pipe_bytes)?;
        let launched = start(ProcessIo::Pipes(ends)).await?;
        let io = Stdio::pipes(pipes, &launched.exit);
        Ok(((launched.pid, launched.exit), io))
    }

    /// Source: kata agent protocol, call order "Kill".
    pub async fn signal_process(&self, request: grpc::SignalProcessRequest) -> Result<()> {
        let container = self.container(&request.container_id)?;
        let process = container.process(&request.exec_id)?;
        let mut signal = i32::try_from(request.signal)
            .ok()
            .filter(|signal| (1..=64).contains(signal))
            .ok_or_else(|| Status::invalid(format!("{} is not a signal", request.signal)))?;
        if request.exec_id.is_empty() && signal == libc::SIGKILL {
            return kill_all(&container);
        }
        // The kernel drops a signal that the first process of a pid namespace does not handle.
        let is_init = Rc::ptr_eq(&process, &container.init);
        if is_init && signal == libc::SIGTERM && !process.handles(Signal::SIGTERM) {
            signal = libc::SIGKILL;
        }
        process.signal(signal)
    }

    pub async fn wait_process(
        &self,
        request: grpc::WaitProcessRequest,
    ) -> Result<grpc::WaitProcessResponse> {
        let container = self.container(&request.container_id)?;
        let process = container.process(&request.exec_id)?;
        let (status, _) = process.exit.wait().await;
        self.oom.look();
        let (waited, forgotten) = oneshot::channel();
        let is_exec = !Rc::ptr_eq(&process, &container.init);
        if is_exec && process.waited.set(waited).is_ok() {
            container.forget_if_done(&request.exec_id);
            // Weak, so that the record's descriptors are closed when it is forgotten.
            let (container, process) = (container.clone(), Rc::downgrade(&process));
            tokio::task::spawn_local(async move {
                if tokio::time::timeout(KEEP_ENDED, forgotten).await.is_err() {
                    container.forget(&request.exec_id, &process);
                }
            });
        }
        Ok(grpc::WaitProcessResponse { status })
    }

    /// No data closes stdin, as `CloseStdin` does.
    pub async fn write_stdin(
        &self,
        request: grpc::WriteStreamRequest,
    ) -> Result<grpc::WriteStreamResponse> {
        let container = self.container(&request.container_id)?;
        let process = container.process(&request.exec_id)?;
        if request.data.is_empty() {
            process.io.close_stdin();
            return Ok(grpc::WriteStreamResponse { len: 0 });
        }
        let written = process.io.write(&request.data).await?;
        let len = u32::try_from(written).context(|| "length".to_owned())?;
        Ok(grpc::WriteStreamResponse { len })
    }

    pub async fn read_stdout(
        &self,
        request: grpc::ReadStreamRequest,
    ) -> Result<grpc::ReadStreamResponse> {
        self.read_output(request, |io| io.stdout.as_ref()).await
    }

    pub async fn read_stderr(
        &self,
        request: grpc::ReadStreamRequest,
    ) -> Result<grpc::ReadStreamResponse> {
        self.read_output(request, |io| io.stderr.as_ref()).await
    }

    async fn read_output(
        &self,
        request: grpc::ReadStreamRequest,
        choose: impl Fn(&Stdio) -> Option<&Output>,
    ) -> Result<grpc::ReadStreamResponse> {
        let container = self.container(&request.container_id)?;
        let process = container.process(&request.exec_id)?;
        // A process with a terminal has one output; the other is at its end from the start.
        let Some(output) = choose(&process.io) else {
            return Ok(grpc::ReadStreamResponse { data: Vec::new() });
        };
        let data = output.read(request.len as usize).await?;
        if data.is_empty() {
            container.forget_if_done(&request.exec_id);
        }
        Ok(grpc::ReadStreamResponse { data })
    }

    pub async fn close_stdin(&self, request: grpc::CloseStdinRequest) -> Result<()> {
        let container = self.container(&request.container_id)?;
        container.process(&request.exec_id)?.io.close_stdin();
        Ok(())
    }

    pub async fn tty_win_resize(&self, request: grpc::TtyWinResizeRequest) -> Result<()> {
        let size = |value| u16::try_from(value).context(|| format!("tty size {value}"));
        let (rows, columns) = (size(request.row)?, size(request.column)?);
        let container = self.container(&request.container_id)?;
        container.process(&request.exec_id)?.io.resize(rows, columns)
    }
}

/// Kills every process of the container; with nothing left to kill the init is not found.
fn kill_all(container: &Container) -> Result<()> {
    let killed = container.cgroup.kill();
    if container.init.exit.get().is_some() {
        return Err(Status::not_found("process not found: ESRCH, it has ended"));
    }
    // Without a cgroup, the end of a pid namespace's first process ends all of it.
    if killed.is_err() { container.init.signal(libc::SIGKILL) } else { Ok(()) }
}

/// Stdio over vsock ports of its own needs a host that this agent has never met.
pub fn refuse_raw_ports(ports: [u32; 3]) -> Result<()> {
    if ports == [0; 3] {
        return Ok(());
    }
    Err(Status::unimplemented("stdio over vsock ports: only RPC streams are served"))
}
