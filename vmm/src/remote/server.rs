//! The machine's side of its socket.

use std::fs;
use std::os::unix::net::UnixStream as Probe;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::{Semaphore, oneshot};
use tokio::time::{sleep, timeout};

use super::{Answer, Directory, REQUEST_MAX, Request, file_error, is_dead, refused};
use crate::error::{Error, STATUS_MISUSE};

/// Most clients at the same time; others are turned away.
const CLIENTS_MAX: usize = 16;
/// How long a client may say nothing, or not take its answer.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long to wait when the host has no descriptor for another client.
const RELIEF: Duration = Duration::from_millis(200);

/// A request, and where its answer goes. Nobody minds if there is none, or nobody to take it.
pub type Asked = (Request, oneshot::Sender<Answer>);

/// A socket that listens.
pub struct Server {
    path: PathBuf,
    requests: UnboundedReceiver<Asked>,
}

impl Server {
    /// Opens the socket of the machine of that name. To be called within the runtime that is to serve it.
    ///
    /// # Errors
    /// If another machine has the name, or the host refuses.
    pub fn open(name: &str) -> Result<Self, Error> {
        let directory = Directory::of_user();
        directory.create()?;
        let path = directory.socket(name);
        let lock = directory.lock()?;
        match Probe::connect(&path) {
            Ok(_) => {
                return Err(Error::Config(format!(
                    "a machine named `{name}` runs already; give another --name"
                )));
            }
            Err(error) if is_dead(&error) => fs::remove_file(&path).map_err(file_error(&path))?,
            Err(_) => {}
        }
        let listener = UnixListener::bind(&path).map_err(file_error(&path))?;
        drop(lock);
        let (sender, requests) = unbounded_channel();
        tokio::spawn(accept(listener, sender));
        Ok(Self { path, requests })
    }

    /// The next request.
    pub async fn next(&mut self) -> Option<Asked> {
        self.requests.recv().await
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Gone already is as good.
        let _ = fs::remove_file(&self.path);
    }
}

async fn accept(listener: UnixListener, requests: UnboundedSender<Asked>) {
    let room = Arc::new(Semaphore::new(CLIENTS_MAX));
    loop {
        let Ok((client, _)) = listener.accept().await else {
            sleep(RELIEF).await;
            continue;
        };
        if let Ok(permit) = room.clone().try_acquire_owned() {
            let requests = requests.clone();
            tokio::spawn(async move {
                // A client that goes away in the middle takes nothing with it.
                let _ = talk(client, requests).await;
                drop(permit);
            });
        }
    }
}

/// Answers a client's requests, one after the other, until it goes away.
async fn talk(client: UnixStream, requests: UnboundedSender<Asked>) -> std::io::Result<()> {
    let (reader, mut writer) = client.into_split();
    let mut reader = BufReader::new(reader.take(REQUEST_MAX));
    loop {
        reader.get_mut().set_limit(REQUEST_MAX);
        let mut line = Vec::new();
        timeout(PATIENCE, reader.read_until(b'\n', &mut line)).await??;
        if line.is_empty() {
            return Ok(());
        }
        let whole = line.ends_with(b"\n");
        let answer = match serde_json::from_slice(&line) {
            Ok(request) if whole => ask(&requests, request).await,
            Ok(_) => refused(
                "a request that does not end with its line".into(),
                STATUS_MISUSE,
            ),
            Err(error) => refused(format!("not a request: {error}"), STATUS_MISUSE),
        };
        let mut text = serde_json::to_vec(&answer)?;
        text.push(b'\n');
        timeout(PATIENCE, writer.write_all(&text)).await??;
        if !whole {
            return Ok(());
        }
    }
}

async fn ask(requests: &UnboundedSender<Asked>, request: Request) -> Answer {
    let (answer, answered) = oneshot::channel();
    let ended = || refused("the machine has ended".into(), crate::error::STATUS_FAILURE);
    if requests.send((request, answer)).is_err() {
        return ended();
    }
    answered.await.unwrap_or_else(|_| ended())
}
