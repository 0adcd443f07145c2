//! The OCI runtime behind the agent: `crun`, one process a verb.
//!
//! Nothing else knows which runtime it is. Stdio is made by the caller and handed over, so that the
//! container's init holds none of the agent's ends.

use std::fs::{self, File};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::rc::Rc;
use std::time::Duration;

use nix::cmsg_space;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

use crate::io::Pollable;
use crate::reaper::{Exit, Reaper};
use crate::status::{Code, Context, Result, Status};
use crate::stdio::ProcessEnds;
use crate::vsock::{Address, accept, listen_on};

const BINARY: &str = "/usr/bin/crun";
const STATE_ROOT: &str = "/run/crun";
/// One verb; an emulated guest on a loaded host needs a second or two.
const VERB_TIMEOUT: Duration = Duration::from_secs(60);

pub struct Runtime {
    reaper: Rc<Reaper>,
}

/// What a new process gets as stdin, stdout and stderr.
pub enum ProcessIo {
    Pipes(ProcessEnds),
    Terminal,
}

/// A process that the runtime has made; `terminal` is the master if it was asked for.
pub struct Launched {
    pub pid: i32,
    pub exit: Rc<Exit>,
    pub terminal: Option<Pollable>,
}

impl Runtime {
    pub fn new(reaper: Rc<Reaper>) -> Self {
        Self { reaper }
    }

    /// Makes the container of the bundle, stopped before its program.
    pub async fn create(&self, id: &str, bundle: &Path, io: ProcessIo) -> Result<Launched> {
        let mut verb = Verb::new("create", bundle);
        verb.command.arg("--bundle").arg(bundle);
        self.launch(verb, id, io).await
    }

    /// Runs a process in the container; the answer comes when its program has been executed.
    pub async fn exec(
        &self,
        id: &str,
        scratch: &Path,
        process_json: &str,
        io: ProcessIo,
    ) -> Result<Launched> {
        let file = scratch.join("process.json");
        fs::write(&file, process_json).context(|| format!("writing {}", file.display()))?;
        let mut verb = Verb::new("exec", scratch);
        verb.command.arg("--detach").arg("--process").arg(&file);
        self.launch(verb, id, io).await
    }

    pub async fn start(&self, id: &str, scratch: &Path) -> Result<()> {
        self.run(Verb::new("start", scratch), id).await
    }

    /// Removes what is left of the container, killing it if it runs.
    pub async fn delete(&self, id: &str, scratch: &Path) -> Result<()> {
        let mut verb = Verb::new("delete", scratch);
        verb.command.arg("--force");
        self.run(verb, id).await
    }

    async fn run(&self, mut verb: Verb, id: &str) -> Result<()> {
        verb.command.arg("--").arg(id).stdin(Stdio::null());
        verb.command.stdout(Stdio::null()).stderr(Stdio::null());
        self.finish(&mut verb).await
    }

    async fn launch(&self, mut verb: Verb, id: &str, io: ProcessIo) -> Result<Launched> {
        let pid_file = verb.scratch.join("pid");
        let console = verb.scratch.join("console");
        verb.command.arg("--pid-file").arg(&pid_file);
        let listener = match &io {
            ProcessIo::Terminal => {
                verb.command.arg("--console-socket").arg(&console);
                let listener = listen_on(&Address::Unix(console.clone()));
                Some(listener.context(|| "listening for a tty".to_owned())?)
            }
            ProcessIo::Pipes(_) => None,
        };
        verb.command.arg("--").arg(id);
        set_stdio(&mut verb.command, io);
        let finished = self.finish(&mut verb).await;
        // The parent's copies of the pipe ends live in the command.
        drop(verb.command);
        let terminal = match (&finished, listener) {
            (Ok(()), Some(listener)) => Some(receive_terminal(&listener).await?),
            _ => None,
        };
        let _ = fs::remove_file(&console);
        finished?;
        let text = fs::read_to_string(&pid_file).context(|| "reading the pid file".to_owned())?;
        let pid = text.trim().parse().context(|| format!("pid file holds {text:?}"))?;
        Ok(Launched { pid, exit: self.reaper.claim(pid), terminal })
    }

    async fn finish(&self, verb: &mut Verb) -> Result<()> {
        let _ = fs::remove_file(&verb.log);
        let (pid, exit) = self
            .reaper
            .spawn(&mut verb.command)
            .context(|| format!("starting {BINARY} {}", verb.name))?;
        let Ok((code, _)) = tokio::time::timeout(VERB_TIMEOUT, exit.wait()).await else {
            let _ = nix::sys::signal::kill(
                nix::unistd::Pid::from_raw(pid),
                nix::sys::signal::Signal::SIGKILL,
            );
            return Err(Status::new(Code::DeadlineExceeded, format!("crun {} hung", verb.name)));
        };
        if code == 0 {
            return Ok(());
        }
        let said = last_message(&fs::read_to_string(&verb.log).unwrap_or_default());
        Err(Status::internal(format!("crun {} ended with {code}: {said}", verb.name)))
    }
}

/// One invocation: `crun --root … --log … VERB …`.
struct Verb {
    name: &'static str,
    scratch: PathBuf,
    log: PathBuf,
    command: Command,
}

impl Verb {
    fn new(name: &'static str, scratch: &Path) -> Self {
        let log = scratch.join("crun.log");
        let mut command = Command::new(BINARY);
        command.env_clear().env("PATH", "/usr/bin:/bin:/usr/sbin:/sbin");
        command.args(["--root", STATE_ROOT, "--cgroup-manager", "cgroupfs", "--log"]).arg(&log);
        command.arg(name);
        Self { name, scratch: scratch.to_owned(), log, command }
    }
}

fn set_stdio(command: &mut Command, io: ProcessIo) {
    match io {
        ProcessIo::Pipes(ends) => {
            command.stdin(File::from(ends.stdin));
            command.stdout(File::from(ends.stdout));
            command.stderr(File::from(ends.stderr));
        }
        ProcessIo::Terminal => {
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        }
    }
}

/// crun's log has a time stamp before each message; the last line is the error.
fn last_message(log: &str) -> String {
    let line =
        log.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it gave no reason");
    match line.split_once("Z: ") {
        Some((_, message)) => message.to_owned(),
        None => line.to_owned(),
    }
}

/// Takes the master of a terminal that the runtime has sent. Source: OCI runtimes' console socket.
async fn receive_terminal(listener: &Pollable) -> Result<Pollable> {
    let receive = async {
        let socket = accept(listener).await?;
        let fd = socket.when_readable(|fd| receive_descriptor(fd.as_raw_fd())).await?;
        Pollable::new(fd)
    };
    match tokio::time::timeout(VERB_TIMEOUT, receive).await {
        Ok(master) => master.context(|| "receiving the tty from crun".to_owned()),
        Err(_) => Err(Status::internal("crun did not send the tty")),
    }
}

fn receive_descriptor(socket: RawFd) -> nix::Result<OwnedFd> {
    let mut name = [0; 256];
    let mut parts = [std::io::IoSliceMut::new(&mut name)];
    let mut space = cmsg_space!([RawFd; 1]);
    let message = recvmsg::<()>(socket, &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = part
            && let Some(fd) = fds.first()
        {
            // SAFETY: the kernel has just made this descriptor for us, so nobody else owns it.
            return Ok(unsafe { OwnedFd::from_raw_fd(*fd) });
        }
    }
    Err(nix::errno::Errno::EBADMSG)
}
