//! Tells once per container that the guest's OOM killer has hit it.
//!
//! The kernel signals a change of `memory.events` through inotify; the count in the file decides.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::AsFd;
use std::rc::Rc;

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};
use tokio::sync::Notify;

use crate::agent::Agent;
use crate::container::Container;
use crate::io::Pollable;
use crate::pb::grpc;
use crate::status::Result;

#[derive(Default)]
struct Table {
    /// Containers that have not been reported yet.
    watched: BTreeMap<String, Watched>,
    reports: VecDeque<String>,
}

struct Watched {
    descriptor: WatchDescriptor,
    container: Rc<Container>,
}

pub struct OomEvents {
    inotify: Inotify,
    ready: Pollable,
    table: RefCell<Table>,
    reported: Notify,
}

impl OomEvents {
    pub fn new() -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        let ready = Pollable::new(inotify.as_fd().try_clone_to_owned()?)?;
        Ok(Self { inotify, ready, table: RefCell::default(), reported: Notify::new() })
    }

    /// Begins to watch; a container without a memory cgroup is never reported.
    pub fn watch(&self, container: &Rc<Container>) {
        let file = container.cgroup.events_file();
        if let Ok(descriptor) = self.inotify.add_watch(&file, AddWatchFlags::IN_MODIFY) {
            let watched = Watched { descriptor, container: container.clone() };
            self.table.borrow_mut().watched.insert(container.id.clone(), watched);
        }
    }

    /// Looks a last time, before the cgroup goes away, and stops watching.
    pub fn forget(&self, id: &str) {
        self.look();
        if let Some(watched) = self.table.borrow_mut().watched.remove(id) {
            // Fails only if the kernel has removed the watch together with the file.
            let _ = self.inotify.rm_watch(watched.descriptor);
        }
    }

    /// Reports containers whose count has risen.
    pub fn look(&self) {
        let mut table = self.table.borrow_mut();
        let hit: Vec<String> = table
            .watched
            .iter()
            .filter(|(_, watched)| watched.container.cgroup.oom_kills() > 0)
            .map(|(id, _)| id.clone())
            .collect();
        for id in hit {
            if let Some(watched) = table.watched.remove(&id) {
                let _ = self.inotify.rm_watch(watched.descriptor);
            }
            table.reports.push_back(id);
            self.reported.notify_one();
        }
    }

    /// Follows the kernel's notifications for ever.
    pub async fn run(&self) -> io::Result<()> {
        let mut buffer = [0; 4096];
        loop {
            self.ready.read(&mut buffer).await?;
            self.look();
        }
    }
}

impl Agent {
    /// Answers when a container has been hit; each report goes to one caller.
    pub async fn get_oom_event(&self, _: grpc::GetOomEventRequest) -> Result<grpc::OomEvent> {
        loop {
            let next = self.oom.table.borrow_mut().reports.pop_front();
            if let Some(container_id) = next {
                if !self.oom.table.borrow().reports.is_empty() {
                    self.oom.reported.notify_one();
                }
                return Ok(grpc::OomEvent { container_id });
            }
            self.oom.reported.notified().await;
        }
    }
}
