//! RPCs on the network.

use std::collections::BTreeSet;
use std::fs;
use std::process::{Command, Stdio};

use crate::agent::Agent;
use crate::block::{parse_pci_path, pci_device, wait_for};
use crate::network::{Address, Link, Network, parse_ip};
use crate::pb::{grpc, types};
use crate::settle::Stage;
use crate::status::{Context, Result, Status};
use crate::{modules, warn};

/// Every network namespace's first link. Source: linux/net_namespace.h, LOOPBACK_IFINDEX.
const LOOPBACK: u32 = 1;
/// Source: linux/if.h, IFNAMSIZ with its NUL.
const MAX_NAME_BYTES: usize = 15;

/// What requests have made of the guest's network, held by one of them at a time: requests that
/// come together are carried out in the order in which they came.
#[derive(Default)]
pub struct Configured {
    /// Links that may have addresses.
    links: BTreeSet<u32>,
    /// There may be routes that somebody configured.
    routes: bool,
}

impl Agent {
    /// Finds the link by its hardware address and makes it what the host describes.
    pub async fn update_interface(
        &self,
        request: grpc::UpdateInterfaceRequest,
    ) -> Result<types::Interface> {
        let mut configured = self.network.lock().await;
        let wanted = request.interface.ok_or_else(|| Status::invalid("no interface"))?;
        check_name(&wanted.name)?;
        self.settling.wait_for(Stage::Devices).await;
        if !wanted.device_path.is_empty() {
            let slots = parse_pci_path(&wanted.device_path)?;
            let look = || {
                let device = pci_device(&slots)?;
                let virtio = fs::read_dir(&device).ok()?.flatten().map(|entry| entry.path());
                let mut places = virtio.chain([device.clone()]).map(|path| path.join("net"));
                places.find(|path| path.exists())
            };
            let what = format!("a network device at PCI path {}", wanted.device_path);
            wait_for(&what, self.config.hotplug_timeout, look).await?;
        }
        let mut network = Network::open()?;
        let mut links = network.links()?;
        let is_it = |link: &&Link| link.hardware_address.eq_ignore_ascii_case(&wanted.hw_addr);
        if !links.iter().any(|link| is_it(&link)) {
            // A hot-plugged interface may be the first of its kind.
            modules::load_for_devices();
            links = network.links()?;
        }
        let link = links
            .iter()
            .find(is_it)
            .ok_or_else(|| Status::internal(format!("Link not found ({})", wanted.hw_addr)))?;
        rename(&mut network, link, &links, &wanted.name)?;
        let is_new = configured.links.insert(link.index) && self.is_init;
        set_addresses(&mut network, link.index, &wanted.ip_addresses, is_new)?;
        let mtu = u32::try_from(wanted.mtu).ok().filter(|mtu| *mtu > 0);
        let arp = wanted.raw_flags & libc::IFF_NOARP.cast_unsigned() == 0;
        network.set_link(link.index, Some(true), None, mtu, Some(arp))?;
        Ok(wanted)
    }

    /// Makes the configured routes exactly those of the request; direct ones come first, because a
    /// gateway must be reachable when its route is added.
    pub async fn update_routes(&self, request: grpc::UpdateRoutesRequest) -> Result<grpc::Routes> {
        let mut configured = self.network.lock().await;
        let wanted = request.routes.unwrap_or_default().routes;
        let mut network = Network::open()?;
        let links = network.links()?;
        if configured.routes || !self.is_init {
            for route in network.routes(&links)? {
                if let Err(status) = network.delete_route(&route, &links) {
                    warn!("{status}");
                }
            }
        }
        configured.routes = true;
        let (direct, by_gateway): (Vec<_>, Vec<_>) =
            wanted.iter().partition(|route| route.gateway.is_empty());
        for route in direct.into_iter().chain(by_gateway) {
            network.add_route(route, &links)?;
        }
        Ok(grpc::Routes { routes: wanted })
    }

    pub async fn add_arp_neighbors(&self, request: grpc::AddArpNeighborsRequest) -> Result<()> {
        let _turn = self.network.lock().await;
        let mut network = Network::open()?;
        let links = network.links()?;
        for neighbour in request.neighbors.unwrap_or_default().arp_neighbors {
            network.add_neighbour(&neighbour, &links)?;
        }
        Ok(())
    }

    pub async fn list_interfaces(
        &self,
        _: grpc::ListInterfacesRequest,
    ) -> Result<grpc::Interfaces> {
        let mut network = Network::open()?;
        let addresses = network.addresses()?;
        let interfaces = network.links()?.iter().map(|link| describe(link, &addresses)).collect();
        Ok(grpc::Interfaces { interfaces })
    }

    pub async fn list_routes(&self, _: grpc::ListRoutesRequest) -> Result<grpc::Routes> {
        let mut network = Network::open()?;
        let links = network.links()?;
        Ok(grpc::Routes { routes: network.routes(&links)? })
    }

    pub async fn get_ip_tables(
        &self,
        request: grpc::GetIpTablesRequest,
    ) -> Result<grpc::GetIpTablesResponse> {
        let name = if request.is_ipv6 { "ip6tables-save" } else { "iptables-save" };
        Ok(grpc::GetIpTablesResponse { data: self.run_iptables(name, &[]).await? })
    }

    pub async fn set_ip_tables(
        &self,
        request: grpc::SetIpTablesRequest,
    ) -> Result<grpc::SetIpTablesResponse> {
        let name = if request.is_ipv6 { "ip6tables-restore" } else { "iptables-restore" };
        Ok(grpc::SetIpTablesResponse { data: self.run_iptables(name, &request.data).await? })
    }

    async fn run_iptables(&self, name: &str, input: &[u8]) -> Result<Vec<u8>> {
        let path = ["/usr/sbin", "/sbin", "/usr/bin"].map(|dir| format!("{dir}/{name}"));
        let Some(path) = path.into_iter().find(|path| fs::exists(path).unwrap_or(false)) else {
            return Err(Status::unimplemented(format!("{name} is not in the guest image")));
        };
        let (pipes, ends) = crate::stdio::make_pipes(0)?;
        let mut command = Command::new(path);
        command.stdin(ends.stdin).stdout(ends.stdout).stderr(Stdio::null());
        let (_, exit) = self.reaper.spawn(&mut command).context(|| format!("starting {name}"))?;
        drop(command);
        drop(ends.stderr);
        let io = crate::stdio::Stdio::pipes(pipes, &exit);
        let (written, output) = tokio::join!(feed(&io, input), collect(&io));
        written?;
        let output = output?;
        match exit.wait().await.0 {
            0 => Ok(output),
            code => Err(Status::internal(format!("{name} ended with {code}"))),
        }
    }
}

async fn feed(io: &crate::stdio::Stdio, mut input: &[u8]) -> Result<()> {
    while !input.is_empty() {
        let written = io.write(input).await?;
        input = &input[written..];
    }
    io.close_stdin();
    Ok(())
}

async fn collect(io: &crate::stdio::Stdio) -> Result<Vec<u8>> {
    const MAX_BYTES: usize = 3 << 20; // below the 4 MiB of a reply
    let mut output = Vec::new();
    while let Some(stdout) = &io.stdout {
        let part = stdout.read(32 * 1024).await?;
        if part.is_empty() {
            break;
        }
        output.extend_from_slice(&part);
        if output.len() > MAX_BYTES {
            return Err(Status::internal("the rule set exceeds 3 MiB"));
        }
    }
    Ok(output)
}

fn check_name(name: &str) -> Result<()> {
    let plain = name.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'/' && byte != b':');
    if plain && (1..=MAX_NAME_BYTES).contains(&name.len()) && name != "." && name != ".." {
        return Ok(());
    }
    Err(Status::invalid(format!("{name:?} is not the name of an interface")))
}

/// Gives a link its name; whoever has the name already gets another one.
fn rename(network: &mut Network, link: &Link, links: &[Link], name: &str) -> Result<()> {
    if link.name == name {
        return Ok(());
    }
    if let Some(other) = links.iter().find(|other| other.name == name) {
        network.set_link(other.index, Some(false), None, None, None)?;
        let spare = format!("old{}", other.index);
        network.set_link(other.index, None, Some(&spare), None, None)?;
    }
    network.set_link(link.index, Some(false), None, None, None)?;
    network.set_link(link.index, None, Some(name), None, None)
}

/// Gives a link these addresses and no others; one that `is_new` has none to take away.
fn set_addresses(
    network: &mut Network,
    link: u32,
    wanted: &[types::IpAddress],
    is_new: bool,
) -> Result<()> {
    let wanted: Vec<Address> = wanted
        .iter()
        .map(|address| {
            let ip = parse_ip(&address.address)?;
            let most = if ip.is_ipv6() { 128 } else { 32 };
            let prefix = address.mask.parse().ok().filter(|prefix| *prefix <= most);
            let prefix = prefix
                .ok_or_else(|| Status::invalid(format!("{:?} is not a prefix", address.mask)))?;
            Ok(Address { link, ip, prefix })
        })
        .collect::<Result<_>>()?;
    let present = if is_new { Vec::new() } else { network.addresses()? };
    for present in present {
        // The kernel makes an IPv6 link-local address itself.
        let is_own = matches!(present.ip, std::net::IpAddr::V6(ip) if ip.is_unicast_link_local());
        if present.link == link && !is_own && !wanted.contains(&present) {
            network.delete_address(&present)?;
        }
    }
    wanted.iter().try_for_each(|address| network.add_address(address))
}

fn describe(link: &Link, addresses: &[Address]) -> types::Interface {
    let own = addresses.iter().filter(|address| address.link == link.index);
    let ip_addresses = own.map(|address| types::IpAddress {
        family: if address.ip.is_ipv6() { types::IpFamily::V6 } else { types::IpFamily::V4 } as i32,
        address: address.ip.to_string(),
        mask: address.prefix.to_string(),
    });
    types::Interface {
        device: link.name.clone(),
        name: link.name.clone(),
        ip_addresses: ip_addresses.collect(),
        mtu: link.mtu.into(),
        hw_addr: link.hardware_address.clone(),
        raw_flags: link.flags,
        ..types::Interface::default()
    }
}

/// Brings up loopback, which every program in the pod expects.
pub fn loopback_up() -> Result<()> {
    Network::open()?.set_link(LOOPBACK, Some(true), None, None, None)
}
