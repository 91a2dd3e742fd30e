//! Where a debugger connects.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

/// Where a debugger connects, if nothing else is said.
pub const DEFAULT: &str = "127.0.0.1:1234";

/// An address that only users of this host can reach: whoever debugs a machine reads and writes all of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A port of the loopback interface; 0 for any that is free.
    Tcp(SocketAddr),
    /// The path of a socket.
    Unix(PathBuf),
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.contains('/') {
            return Ok(Self::Unix(text.into()));
        }
        let (host, port) = text.rsplit_once(':').unwrap_or(("", text));
        let host = host
            .strip_prefix('[')
            .and_then(|host| host.strip_suffix(']'))
            .unwrap_or(host);
        let host = match host {
            "" | "localhost" => Some(IpAddr::V4(Ipv4Addr::LOCALHOST)),
            _ => host.parse().ok(),
        };
        match (host, port.parse()) {
            (Some(host), Ok(port)) if host.is_loopback() => {
                Ok(Self::Tcp(SocketAddr::new(host, port)))
            }
            (Some(host), Ok(_)) => Err(format!(
                "{host} is not this host alone; give a loopback address such as {DEFAULT}, and \
                 forward that to debug from elsewhere"
            )),
            _ => Err(format!(
                "`{text}` is neither a loopback address such as {DEFAULT} nor the path of a socket, \
                 with a `/` in it"
            )),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => path.display().fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_host_is_accepted() {
        let tcp = |text: &str| match text.parse() {
            Ok(Address::Tcp(address)) => address.to_string(),
            other => panic!("{text}: {other:?}"),
        };
        assert_eq!(tcp(DEFAULT), DEFAULT);
        for text in ["1234", ":1234", "localhost:1234"] {
            assert_eq!(tcp(text), DEFAULT);
        }
        assert_eq!(tcp("[::1]:0"), "[::1]:0");
        assert_eq!("./gdb".parse(), Ok(Address::Unix("./gdb".into())));
        for text in [
            "0.0.0.0:1234",
            "[::]:1",
            "192.168.1.2:1",
            "host:1",
            "tour",
            "",
            "127.0.0.1:65536",
        ] {
            let refused = text.parse::<Address>().unwrap_err();
            assert!(
                !refused.contains('\n') && refused.contains(DEFAULT),
                "{refused}"
            );
        }
    }
}
