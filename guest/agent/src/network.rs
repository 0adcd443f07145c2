//! The pod's network inside the guest: links, addresses, routes, neighbours.
//!
//! The host decides everything; the guest's own network namespace is the pod's.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::netlink::{Body, Message, Netlink, text, word};
use crate::pb::types;
use crate::status::{Context, Result, Status};

const LINK_HEADER: usize = 16;
const ADDRESS_HEADER: usize = 8;
const ROUTE_HEADER: usize = 12;
// Attribute numbers. Source: linux/if_link.h, if_addr.h, rtnetlink.h, neighbour.h.
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PREFSRC: u16 = 7;
const RTA_METRICS: u16 = 8;
const RTAX_MTU: u16 = 2;
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
const NUD_PERMANENT: u16 = 0x80;
const NEW: i32 = libc::NLM_F_CREATE | libc::NLM_F_REPLACE;

#[derive(Clone, Debug)]
pub struct Link {
    pub index: u32,
    pub name: String,
    pub hardware_address: String,
    pub mtu: u32,
    pub flags: u32,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Address {
    pub link: u32,
    pub ip: IpAddr,
    pub prefix: u8,
}

pub struct Network(Netlink);

impl Network {
    pub fn open() -> Result<Self> {
        Ok(Self(Netlink::open().context(|| "netlink socket".to_owned())?))
    }

    pub fn links(&mut self) -> Result<Vec<Link>> {
        let messages = self.0.dump(libc::RTM_GETLINK, &Body::new(&[0; LINK_HEADER]));
        Ok(messages.context(|| "listing links".to_owned())?.iter().map(link).collect())
    }

    /// Changes flags, name or MTU of a link.
    pub fn set_link(
        &mut self,
        index: u32,
        up: Option<bool>,
        name: Option<&str>,
        mtu: Option<u32>,
        arp: Option<bool>,
    ) -> Result<()> {
        let bit = |wanted: Option<bool>, flag: i32| {
            let flag = flag.cast_unsigned();
            wanted.map_or((0, 0), |on| (if on { flag } else { 0 }, flag))
        };
        let (up_value, up_mask) = bit(up, libc::IFF_UP);
        let (noarp_value, noarp_mask) = bit(arp.map(|arp| !arp), libc::IFF_NOARP);
        let mut header = [0; LINK_HEADER];
        header[4..8].copy_from_slice(&index.to_ne_bytes());
        header[8..12].copy_from_slice(&(up_value | noarp_value).to_ne_bytes());
        header[12..16].copy_from_slice(&(up_mask | noarp_mask).to_ne_bytes());
        let name = name.map(|name| [name.as_bytes(), &[0]].concat());
        let body = Body::new(&header)
            .attribute_if(IFLA_IFNAME, name.as_deref())
            .attribute_if(IFLA_MTU, mtu.map(u32::to_ne_bytes).as_ref().map(<[u8; 4]>::as_slice));
        self.0.change(libc::RTM_NEWLINK, 0, &body).context(|| format!("link {index}"))
    }

    pub fn addresses(&mut self) -> Result<Vec<Address>> {
        let messages = self.0.dump(libc::RTM_GETADDR, &Body::new(&[0; ADDRESS_HEADER]));
        Ok(messages
            .context(|| "listing addresses".to_owned())?
            .iter()
            .filter_map(address)
            .collect())
    }

    pub fn add_address(&mut self, address: &Address) -> Result<()> {
        let body = address_body(address);
        self.0
            .change(libc::RTM_NEWADDR, NEW, &body)
            .context(|| format!("address {}/{}", address.ip, address.prefix))
    }

    pub fn delete_address(&mut self, address: &Address) -> Result<()> {
        let body = address_body(address);
        self.0
            .change(libc::RTM_DELADDR, 0, &body)
            .context(|| format!("removing address {}/{}", address.ip, address.prefix))
    }

    /// Routes of the main table that somebody configured: not the kernel's own, not loopback's.
    pub fn routes(&mut self, links: &[Link]) -> Result<Vec<types::Route>> {
        let messages = self
            .0
            .dump(libc::RTM_GETROUTE, &Body::new(&[0; ROUTE_HEADER]))
            .context(|| "listing routes".to_owned())?;
        Ok(messages.iter().filter_map(|message| route(message, links)).collect())
    }

    pub fn add_route(&mut self, route: &types::Route, links: &[Link]) -> Result<()> {
        let body = route_body(route, links)?;
        self.0.change(libc::RTM_NEWROUTE, NEW, &body).context(|| {
            format!("route {} via {:?} dev {}", route.dest, route.gateway, route.device)
        })
    }

    pub fn delete_route(&mut self, route: &types::Route, links: &[Link]) -> Result<()> {
        let body = route_body(route, links)?;
        self.0
            .change(libc::RTM_DELROUTE, 0, &body)
            .context(|| format!("removing route {} dev {}", route.dest, route.device))
    }

    pub fn add_neighbour(&mut self, neighbour: &types::ArpNeighbor, links: &[Link]) -> Result<()> {
        let link = link_by_name(&neighbour.device, links)?;
        let target = neighbour.to_ip_address.as_ref().map_or("", |ip| ip.address.as_str());
        let ip = parse_ip(target.split('/').next().unwrap_or(""))?;
        let family = if ip.is_ipv6() { libc::AF_INET6 } else { libc::AF_INET };
        let state = u16::try_from(neighbour.state).ok().filter(|state| *state != 0);
        let mut header = [0; 12];
        header[0] = u8::try_from(family).unwrap_or(0);
        header[4..8].copy_from_slice(&link.index.to_ne_bytes());
        header[8..10].copy_from_slice(&state.unwrap_or(NUD_PERMANENT).to_ne_bytes());
        header[10] = u8::try_from(neighbour.flags).unwrap_or(0);
        header[11] = libc::RTN_UNICAST;
        let hardware = parse_hardware_address(&neighbour.lladdr)?;
        let body = Body::new(&header)
            .attribute(NDA_DST, &octets(ip))
            .attribute_if(NDA_LLADDR, hardware.as_deref());
        self.0
            .change(libc::RTM_NEWNEIGH, NEW, &body)
            .context(|| format!("neighbour {ip} on {}", neighbour.device))
    }
}

fn link_by_name<'a>(name: &str, links: &'a [Link]) -> Result<&'a Link> {
    let found = links.iter().find(|link| link.name == name);
    found.ok_or_else(|| Status::internal(format!("Link not found (name {name})")))
}

fn route_body(route: &types::Route, links: &[Link]) -> Result<Body> {
    let link = link_by_name(&route.device, links)?;
    let is_v6 = route.family == types::IpFamily::V6 as i32;
    let (destination, prefix) = parse_prefix(&route.dest, is_v6)?;
    let optional = |text: &str| -> Result<Option<Vec<u8>>> {
        let text = text.split('/').next().unwrap_or("");
        if text.is_empty() { Ok(None) } else { parse_ip(text).map(|ip| Some(octets(ip))) }
    };
    let (gateway, source) = (optional(&route.gateway)?, optional(&route.source)?);
    let scope = u8::try_from(route.scope).context(|| format!("scope {}", route.scope))?;
    let family = if is_v6 { libc::AF_INET6 } else { libc::AF_INET };
    let mut header = [0; ROUTE_HEADER];
    header[0] = u8::try_from(family).unwrap_or(0);
    header[1] = prefix;
    header[4] = libc::RT_TABLE_MAIN;
    header[5] = libc::RTPROT_BOOT;
    header[6] = scope;
    header[7] = libc::RTN_UNICAST;
    header[8..12].copy_from_slice(&route.flags.to_ne_bytes());
    let destination = (prefix > 0).then(|| octets(destination));
    let mut body = Body::new(&header)
        .attribute_if(RTA_DST, destination.as_deref())
        .attribute(RTA_OIF, &link.index.to_ne_bytes())
        .attribute_if(RTA_GATEWAY, gateway.as_deref())
        .attribute_if(RTA_PREFSRC, source.as_deref());
    if route.mtu > 0 {
        let mut metric = [0; 8];
        metric[..2].copy_from_slice(&8_u16.to_ne_bytes());
        metric[2..4].copy_from_slice(&RTAX_MTU.to_ne_bytes());
        metric[4..].copy_from_slice(&route.mtu.to_ne_bytes());
        body = body.attribute(RTA_METRICS, &metric);
    }
    Ok(body)
}

fn link(message: &Message) -> Link {
    let mut link = Link {
        index: word(&message.body, 4),
        flags: word(&message.body, 8),
        name: String::new(),
        hardware_address: String::new(),
        mtu: 0,
    };
    for (kind, value) in message.attributes(LINK_HEADER) {
        match kind {
            IFLA_IFNAME => link.name = text(value),
            IFLA_MTU => link.mtu = word(value, 0),
            IFLA_ADDRESS => {
                let bytes: Vec<String> = value.iter().map(|byte| format!("{byte:02x}")).collect();
                link.hardware_address = bytes.join(":");
            }
            _ => {}
        }
    }
    link
}

fn address(message: &Message) -> Option<Address> {
    let attributes = message.attributes(ADDRESS_HEADER);
    let value =
        |wanted| attributes.iter().find(|(kind, _)| *kind == wanted).map(|(_, value)| *value);
    // On a point-to-point link the local address is the second one.
    let ip = ip_from(value(IFA_LOCAL).or_else(|| value(IFA_ADDRESS))?)?;
    Some(Address { link: word(&message.body, 4), ip, prefix: *message.body.get(1)? })
}

fn address_body(address: &Address) -> Body {
    let family = if address.ip.is_ipv6() { libc::AF_INET6 } else { libc::AF_INET };
    let mut header = [0; ADDRESS_HEADER];
    header[0] = u8::try_from(family).unwrap_or(0);
    header[1] = address.prefix;
    // Duplicate address detection would keep an IPv6 address unusable for a second; the host has
    // given it to this pod alone.
    header[2] = if address.ip.is_ipv6() { 0x02 } else { 0 };
    header[4..8].copy_from_slice(&address.link.to_ne_bytes());
    let ip = octets(address.ip);
    Body::new(&header).attribute(IFA_LOCAL, &ip).attribute(IFA_ADDRESS, &ip)
}

fn route(message: &Message, links: &[Link]) -> Option<types::Route> {
    let header = message.body.get(..ROUTE_HEADER)?;
    let is_own = header[5] == libc::RTPROT_KERNEL || header[7] != libc::RTN_UNICAST;
    if header[4] != libc::RT_TABLE_MAIN || is_own {
        return None;
    }
    let is_v6 = i32::from(header[0]) == libc::AF_INET6;
    let mut route = types::Route {
        family: if is_v6 { types::IpFamily::V6 } else { types::IpFamily::V4 } as i32,
        scope: header[6].into(),
        flags: word(header, 8),
        ..types::Route::default()
    };
    for (kind, value) in message.attributes(ROUTE_HEADER) {
        let ip = || ip_from(value).map_or_else(String::new, |ip| ip.to_string());
        match kind {
            RTA_DST => route.dest = format!("{}/{}", ip(), header[1]),
            RTA_GATEWAY => route.gateway = ip(),
            RTA_PREFSRC => route.source = ip(),
            RTA_OIF => {
                let link = links.iter().find(|link| link.index == word(value, 0))?;
                route.device.clone_from(&link.name);
            }
            _ => {}
        }
    }
    (route.device != "lo" && !route.device.is_empty()).then_some(route)
}

fn ip_from(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(four) = <[u8; 4]>::try_from(bytes) {
        return Some(Ipv4Addr::from(four).into());
    }
    <[u8; 16]>::try_from(bytes).ok().map(|sixteen| Ipv6Addr::from(sixteen).into())
}

pub fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

pub fn parse_ip(text: &str) -> Result<IpAddr> {
    text.parse().map_err(|_| Status::invalid(format!("{text:?} is not an IP address")))
}

/// `10.0.0.0/8`, a single address, or nothing for the default route.
fn parse_prefix(text: &str, is_v6: bool) -> Result<(IpAddr, u8)> {
    if text.is_empty() || text == "default" {
        let any = if is_v6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
        return Ok((any, 0));
    }
    let (ip, length) = text.split_once('/').unwrap_or((text, ""));
    let ip = parse_ip(ip)?;
    let most = if ip.is_ipv6() { 128 } else { 32 };
    let length = if length.is_empty() { Ok(most) } else { length.parse() };
    match length {
        Ok(length) if length <= most && ip.is_ipv6() == is_v6 => Ok((ip, length)),
        _ => Err(Status::invalid(format!("{text:?} is not a destination of its family"))),
    }
}

fn parse_hardware_address(text: &str) -> Result<Option<Vec<u8>>> {
    if text.is_empty() {
        return Ok(None);
    }
    let bytes: Option<Vec<u8>> =
        text.split(':').map(|part| u8::from_str_radix(part, 16).ok()).collect();
    bytes.map(Some).ok_or_else(|| Status::invalid(format!("{text:?} is not a hardware address")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations_are_checked_against_their_family() {
        assert_eq!(parse_prefix("", false).unwrap().1, 0);
        assert_eq!(parse_prefix("10.0.0.0/8", false).unwrap().1, 8);
        assert_eq!(parse_prefix("10.0.0.1", false).unwrap().1, 32);
        assert_eq!(parse_prefix("fd00::/8", true).unwrap().1, 8);
        for (bad, is_v6) in [("10.0.0.0/33", false), ("fd00::/8", false), ("x/8", false)] {
            assert!(parse_prefix(bad, is_v6).is_err(), "{bad}");
        }
    }
}
