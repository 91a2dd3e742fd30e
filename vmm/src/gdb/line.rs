//! The connection to a debugger: one at a time, and another one when that has hung up.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixStream as Probe;
use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, UnixListener};
use tokio::time::{sleep, timeout};

use super::address::Address;
use crate::error::Error;

/// How long a debugger may take to take an answer. The machine's other affairs wait so long.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long to wait when the host has no descriptor for a debugger.
const RELIEF: Duration = Duration::from_millis(200);
/// Most bytes heard at once.
const HEARD_MAX: usize = 4096;

/// What is heard.
pub enum Said {
    /// Bytes of the protocol.
    Bytes(Vec<u8>),
    /// The debugger has hung up.
    Gone,
}

/// A connection, of either kind.
trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// Where a debugger connects, and the one that has.
pub struct Line {
    address: Address,
    listener: Listener,
    client: Option<Box<dyn Stream>>,
}

impl Line {
    /// To be called within the runtime that is to serve it.
    ///
    /// # Errors
    /// If the address is in use, or the host refuses it.
    pub fn open(address: &Address) -> Result<Self, Error> {
        let (listener, address) = open(address).map_err(|error| {
            Error::Config(format!(
                "a debugger cannot connect at `{address}`: {error}; give another address, as in \
                 --gdb=127.0.0.1:0 for any port"
            ))
        })?;
        Ok(Self {
            address,
            listener,
            client: None,
        })
    }

    /// Where it is.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Waits for the debugger to say something.
    pub async fn next(&mut self) -> Said {
        loop {
            let Some(client) = &mut self.client else {
                match self.listener.accept().await {
                    Ok(client) => self.client = Some(client),
                    Err(_) => sleep(RELIEF).await,
                }
                continue;
            };
            let mut bytes = vec![0; HEARD_MAX];
            return match client.read(&mut bytes).await {
                Ok(heard @ 1..) => {
                    bytes.truncate(heard);
                    Said::Bytes(bytes)
                }
                Ok(0) | Err(_) => {
                    self.hang_up();
                    Said::Gone
                }
            };
        }
    }

    /// Says something to the debugger. Whether it took it; if not, it is hung up on.
    pub async fn say(&mut self, text: &[u8]) -> bool {
        let Some(client) = &mut self.client else {
            return false;
        };
        let taken = matches!(timeout(PATIENCE, client.write_all(text)).await, Ok(Ok(())));
        if !taken {
            self.hang_up();
        }
        taken
    }

    /// Hangs up.
    pub fn hang_up(&mut self) {
        self.client = None;
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        if let Address::Unix(path) = &self.address {
            // Gone already is as good.
            let _ = fs::remove_file(path);
        }
    }
}

impl Listener {
    async fn accept(&self) -> io::Result<Box<dyn Stream>> {
        Ok(match self {
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                // Every answer is waited for.
                stream.set_nodelay(true)?;
                Box::new(stream)
            }
            Self::Unix(listener) => Box::new(listener.accept().await?.0),
        })
    }
}

fn open(address: &Address) -> io::Result<(Listener, Address)> {
    match address {
        Address::Tcp(address) => {
            let listener = std::net::TcpListener::bind(address)?;
            listener.set_nonblocking(true)?;
            let address = Address::Tcp(listener.local_addr()?);
            Ok((Listener::Tcp(TcpListener::from_std(listener)?), address))
        }
        Address::Unix(path) => {
            remove_dead(path)?;
            let listener = UnixListener::bind(path)?;
            fs::set_permissions(path, Permissions::from_mode(0o600))?;
            Ok((Listener::Unix(listener), address.clone()))
        }
    }
}

/// Removes a socket at which nobody listens any more.
fn remove_dead(path: &Path) -> io::Result<()> {
    let socket = fs::symlink_metadata(path).is_ok_and(|about| about.file_type().is_socket());
    match socket.then(|| Probe::connect(path)) {
        Some(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path)
        }
        _ => Ok(()),
    }
}
