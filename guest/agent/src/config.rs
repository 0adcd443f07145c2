//! What the agent is told at its start: the kernel command line as PID 1, arguments otherwise.
//!
//! Upstream's `agent.*` parameters are accepted; those that this agent has no use for are ignored,
//! because hosts add them without asking which agent the image holds.

use std::time::Duration;

use crate::vsock::Address;

/// Source: kata agent protocol, "Transport".
const AGENT_PORT: u32 = 1024;
/// Source: kata guest kernel parameters, `agent.hotplug_timeout`.
const HOTPLUG_TIMEOUT: Duration = Duration::from_secs(3);

#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    pub address: Address,
    /// Host port that wants to be told when the agent listens; 0: nobody.
    pub ready_port: u32,
    /// Our port for connections to the pod's loopback; 0: none are taken.
    pub forward_port: u32,
    pub log_level: String,
    pub hotplug_timeout: Duration,
    /// 0: the kernel's default.
    pub container_pipe_bytes: i32,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            address: Address::Vsock { cid: libc::VMADDR_CID_ANY, port: AGENT_PORT },
            ready_port: 0,
            forward_port: 0,
            log_level: "info".to_owned(),
            hotplug_timeout: HOTPLUG_TIMEOUT,
            container_pipe_bytes: 0,
        }
    }
}

impl Config {
    /// Reads the parameters of a kernel command line; a value that doesn't parse keeps the default.
    pub fn from_cmdline(cmdline: &str) -> Self {
        let mut config = Self::default();
        for word in cmdline.split_ascii_whitespace() {
            let (key, value) = word.split_once('=').unwrap_or((word, ""));
            config.apply(key, value);
        }
        config
    }

    fn apply(&mut self, key: &str, value: &str) {
        match key {
            "kata.ready_port" => self.ready_port = value.parse().unwrap_or(0),
            "kata.forward_port" => self.forward_port = value.parse().unwrap_or(0),
            "agent.log" => value.clone_into(&mut self.log_level),
            "agent.devmode" => "debug".clone_into(&mut self.log_level),
            "agent.server_addr" => {
                if let Some(address) = Address::parse(value) {
                    self.address = address;
                }
            }
            "agent.hotplug_timeout" => {
                if let Ok(seconds) = value.parse() {
                    self.hotplug_timeout = Duration::from_secs(seconds);
                }
            }
            "agent.container_pipe_size" => {
                self.container_pipe_bytes = value.parse().unwrap_or(0);
            }
            _ => {}
        }
    }

    /// Reads the arguments of an agent that runs as a plain process:
    /// `--listen unix:/path` and any `key=value` of the kernel command line.
    pub fn from_args(args: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut config = Self::default();
        let mut args = args;
        while let Some(arg) = args.next() {
            if arg == "--listen" {
                let value = args.next().ok_or("--listen needs an address")?;
                config.address = Address::parse(&value).ok_or_else(|| {
                    format!("{value:?} is neither unix:PATH nor vsock://CID:PORT")
                })?;
            } else if let Some((key, value)) = arg.split_once('=') {
                config.apply(key, value);
            } else {
                return Err(format!("unknown argument {arg:?}; usage: --listen unix:/path"));
            }
        }
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn upstream_parameters_are_read_and_unknown_ones_ignored() {
        let config = Config::from_cmdline(
            "console=ttyS0 agent.log=debug agent.hotplug_timeout=7 agent.unknown=1 \
             agent.server_addr=vsock://-1:2048 kata.ready_port=1030 kata.forward_port=1031 quiet\n",
        );
        assert_eq!(config.log_level, "debug");
        assert_eq!(config.hotplug_timeout, Duration::from_secs(7));
        assert_eq!(config.ready_port, 1030);
        assert_eq!(config.forward_port, 1031);
        assert_eq!(config.address, Address::Vsock { cid: u32::MAX, port: 2048 });
    }

    #[test]
    fn value_that_does_not_parse_keeps_the_default() {
        let config = Config::from_cmdline("agent.hotplug_timeout=soon agent.server_addr=x");
        assert_eq!(config, Config::default());
    }

    #[test]
    fn plain_process_needs_a_known_argument() {
        let args = |words: &[&str]| Config::from_args(words.iter().map(ToString::to_string));
        assert_eq!(args(&["--listen", "unix:/a/b"]).unwrap().address, Address::Unix("/a/b".into()));
        assert!(args(&["--listen"]).is_err());
        assert!(args(&["--frob"]).is_err());
    }
}
