//! The guest's figures as Prometheus text, under the names that Kata's dashboards know.
//!
//! Source: kata metrics families `kata_guest_*` and `kata_agent_*`.

use std::fmt::Write;
use std::fs;

use crate::network::Link;

struct Text(String);

impl Text {
    fn family(&mut self, name: &str, help: &str) {
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} gauge");
    }

    fn value(&mut self, name: &str, labels: &[(&str, &str)], value: &str) {
        let labels: Vec<String> = labels
            .iter()
            .map(|(key, text)| format!("{key}=\"{}\"", text.replace(['"', '\\', '\n'], "_")))
            .collect();
        let labels =
            if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
        let _ = writeln!(self.0, "{name}{labels} {value}");
    }
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

pub fn collect(links: &[Link]) -> String {
    let mut text = Text(String::new());
    load_and_tasks(&mut text);
    processors(&mut text);
    key_values(&mut text, "kata_guest_meminfo", "Memory of the guest.", &read("/proc/meminfo"));
    key_values(&mut text, "kata_guest_vm_stat", "Virtual memory counters.", &read("/proc/vmstat"));
    disks(&mut text);
    links_of(&mut text, links);
    agent_itself(&mut text);
    text.0
}

fn load_and_tasks(text: &mut Text) {
    let load = read("/proc/loadavg");
    let fields: Vec<&str> = load.split_ascii_whitespace().collect();
    text.family("kata_guest_load", "Load average.");
    for (item, value) in ["load1", "load5", "load15"].iter().zip(&fields) {
        text.value("kata_guest_load", &[("item", item)], value);
    }
    text.family("kata_guest_tasks", "Tasks of the guest.");
    if let Some((running, all)) = fields.get(3).and_then(|field| field.split_once('/')) {
        text.value("kata_guest_tasks", &[("item", "cur")], running);
        text.value("kata_guest_tasks", &[("item", "max")], all);
    }
}

fn processors(text: &mut Text) {
    const MODES: [&str; 10] = [
        "user",
        "nice",
        "system",
        "idle",
        "iowait",
        "irq",
        "softirq",
        "steal",
        "guest",
        "guest_nice",
    ];
    text.family("kata_guest_cpu_time", "Processor time in ticks.");
    for line in read("/proc/stat").lines().filter(|line| line.starts_with("cpu")) {
        let mut fields = line.split_ascii_whitespace();
        let name = match fields.next() {
            Some("cpu") => "total",
            Some(name) => name,
            None => continue,
        };
        for (mode, value) in MODES.iter().zip(fields) {
            text.value("kata_guest_cpu_time", &[("cpu", name), ("item", mode)], value);
        }
    }
}

/// Files with `key value` or `key: value kB` lines.
fn key_values(text: &mut Text, family: &str, help: &str, lines: &str) {
    text.family(family, help);
    for line in lines.lines() {
        let mut fields = line.split_ascii_whitespace();
        if let (Some(key), Some(value)) = (fields.next(), fields.next())
            && value.bytes().all(|byte| byte.is_ascii_digit())
        {
            let key = key.trim_end_matches(':').to_lowercase();
            text.value(family, &[("item", &key)], value);
        }
    }
}

fn disks(text: &mut Text) {
    const ITEMS: [&str; 11] = [
        "reads",
        "reads_merged",
        "sectors_read",
        "time_reading",
        "writes",
        "writes_merged",
        "sectors_written",
        "time_writing",
        "in_progress",
        "time_in_progress",
        "weighted_time_in_progress",
    ];
    text.family("kata_guest_diskstat", "Disks of the guest.");
    for line in read("/proc/diskstats").lines() {
        let mut fields = line.split_ascii_whitespace().skip(2);
        let Some(disk) = fields.next() else { continue };
        for (item, value) in ITEMS.iter().zip(fields) {
            text.value("kata_guest_diskstat", &[("disk", disk), ("item", item)], value);
        }
    }
}

fn links_of(text: &mut Text, links: &[Link]) {
    const ITEMS: [(&str, &str); 8] = [
        ("recv_bytes", "rx_bytes"),
        ("recv_packets", "rx_packets"),
        ("recv_errs", "rx_errors"),
        ("recv_drop", "rx_dropped"),
        ("sent_bytes", "tx_bytes"),
        ("sent_packets", "tx_packets"),
        ("sent_errs", "tx_errors"),
        ("sent_drop", "tx_dropped"),
    ];
    text.family("kata_guest_netdev_stat", "Interfaces of the guest.");
    for link in links {
        for (item, file) in ITEMS {
            let value = read(&format!("/sys/class/net/{}/statistics/{file}", link.name));
            let labels = [("interface", link.name.as_str()), ("item", item)];
            if !value.is_empty() {
                text.value("kata_guest_netdev_stat", &labels, value.trim());
            }
        }
    }
}

fn agent_itself(text: &mut Text) {
    let status = read("/proc/self/status");
    text.family("kata_agent_proc_status", "The agent's /proc/self/status, memory in kB.");
    for line in status.lines().filter(|line| line.starts_with("Vm") || line.starts_with("Rss")) {
        let mut fields = line.split_ascii_whitespace();
        if let (Some(key), Some(value)) = (fields.next(), fields.next()) {
            let key = key.trim_end_matches(':').to_lowercase();
            text.value("kata_agent_proc_status", &[("item", &key)], value);
        }
    }
    let descriptors = fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
    text.family("kata_agent_open_fds", "Open descriptors of the agent.");
    text.value("kata_agent_open_fds", &[], &descriptors.to_string());
    let threads = status.lines().find_map(|line| line.strip_prefix("Threads:"));
    text.family("kata_agent_threads", "Threads of the agent.");
    text.value("kata_agent_threads", &[], threads.unwrap_or("0").trim());
    key_values(text, "kata_agent_io_stat", "The agent's /proc/self/io.", &read("/proc/self/io"));
}
