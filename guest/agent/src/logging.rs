//! Log lines of the agent: the kernel's log as PID 1, stderr as a plain process.
//!
//! The kernel's log keeps order with the kernel's own messages, is bounded, and reaches the serial
//! console only from the level that the kernel command line asks for.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::fs::File;
use std::io::Write;

/// Levels of syslog; a smaller number is more important.
#[derive(Clone, Copy, PartialEq, PartialOrd)]
pub enum Level {
    Error = 3,
    Warning = 4,
    Info = 6,
    Debug = 7,
}

thread_local! {
    static KERNEL_LOG: RefCell<Option<File>> = const { RefCell::new(None) };
    static MOST_DETAILED: Cell<Level> = const { Cell::new(Level::Info) };
}

/// Sends later lines to the kernel's log instead of stderr.
pub fn use_kernel_log() {
    let opened = File::options().write(true).open("/dev/kmsg").ok();
    KERNEL_LOG.with(|log| *log.borrow_mut() = opened);
}

/// Sets the level by its name in `agent.log=`; an unknown name changes nothing.
pub fn set_level(name: &str) {
    let level = match name {
        "error" | "critical" => Level::Error,
        "warn" | "warning" => Level::Warning,
        "info" => Level::Info,
        "debug" | "trace" => Level::Debug,
        _ => return,
    };
    MOST_DETAILED.with(|cell| cell.set(level));
}

/// Writes one line; never fails, because there is nobody to tell.
pub fn write(level: Level, text: fmt::Arguments<'_>) {
    if level > MOST_DETAILED.with(Cell::get) {
        return;
    }
    KERNEL_LOG.with(|log| match log.borrow_mut().as_mut() {
        Some(file) => {
            let _ = file.write_all(format!("<{}>agent: {text}\n", level as u8).as_bytes());
        }
        None => eprintln!("agent: {text}"),
    });
}

#[macro_export]
macro_rules! error {
    ($($arg:tt)*) => { $crate::logging::write($crate::logging::Level::Error, format_args!($($arg)*)) };
}
#[macro_export]
macro_rules! warn {
    ($($arg:tt)*) => { $crate::logging::write($crate::logging::Level::Warning, format_args!($($arg)*)) };
}
#[macro_export]
macro_rules! info {
    ($($arg:tt)*) => { $crate::logging::write($crate::logging::Level::Info, format_args!($($arg)*)) };
}
#[macro_export]
macro_rules! debug {
    ($($arg:tt)*) => { $crate::logging::write($crate::logging::Level::Debug, format_args!($($arg)*)) };
}
