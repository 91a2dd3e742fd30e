//! Reaching a machine that runs in another process: a socket for each, and what is said over it.
//!
//! The sockets lie in a directory that only their user can enter. Requests and answers are JSON, one to a
//! line. The machine's side ([`server`]) only hands requests to the control plane, which deals with
//! them between other things ([`serve`]); no vCPU waits for a client, whatever that does.

pub mod client;
pub mod server;

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::{Error, STATUS_FAILURE, STATUS_MISUSE};
use crate::inspect::{Report, View};
use crate::point::Point;
use crate::stop::StopReason;
use crate::vm::Vm;

/// Longest request, bytes.
const REQUEST_MAX: u64 = 64 << 10;
/// Longest name of a machine, characters.
const NAME_MAX: usize = 48;

/// How long a vCPU may take for the instructions that it is to step through.
const STEP_PATIENCE: Duration = Duration::from_secs(2);

/// What is asked of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Request {
    /// What it is, and whether it runs.
    Status,
    /// Stop all vCPUs between two instructions.
    Pause,
    /// Let all vCPUs run.
    Resume,
    /// Let one vCPU execute instructions, one at a time; the others stay paused.
    Step {
        /// Number of the vCPU.
        vcpu: u32,
        /// Number of instructions.
        count: u32,
    },
    /// Show something; a machine that runs is paused for that long.
    Inspect(View),
}

/// What it answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Answer {
    /// To [`Request::Status`].
    Status(Status),
    /// It is done; what happened, on one line.
    Done(String),
    /// To [`Request::Inspect`].
    Seen {
        /// What was to be seen.
        report: Report,
        /// Whether the machine was paused for it.
        paused: bool,
    },
    /// It is not done.
    Refused {
        /// Why not, on one line.
        why: String,
        /// Exit status of a command that asked for it.
        status: u8,
    },
}

/// What a machine is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// Process that it runs in.
    pub pid: u32,
    /// Whether it runs; if not, it is paused.
    pub running: bool,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Bytes of memory.
    pub memory: u64,
    /// Configuration of its kernel; none for a flat guest.
    pub kernel: Option<String>,
    /// Program that it runs; none for a machine that was saved.
    pub program: Option<String>,
    /// Milliseconds since it was built.
    pub age_ms: u64,
}

/// Does what a request asks for.
pub fn serve(vm: &mut Vm, request: &Request) -> Answer {
    match request {
        Request::Status => Answer::Status(vm.status()),
        Request::Pause => match (vm.is_running(), vm.pause()) {
            (_, Err(stop)) => stopped(&stop),
            (true, Ok(())) => Answer::Done("paused".into()),
            (false, Ok(())) => Answer::Done("was paused already".into()),
        },
        Request::Resume => {
            let ran = vm.is_running();
            vm.resume();
            Answer::Done(if ran { "runs already" } else { "runs" }.into())
        }
        Request::Step { vcpu, count } => step(vm, *vcpu, *count),
        Request::Inspect(view) => look(vm, view),
    }
}

fn step(vm: &mut Vm, vcpu: u32, count: u32) -> Answer {
    if vm.is_running() {
        return refused("the machine runs; pause it first".into(), STATUS_MISUSE);
    }
    if vm.counts.is_some() {
        let why = "the machine's instructions are being counted; run it without --count";
        return refused(why.into(), STATUS_MISUSE);
    }
    let vcpus = vm.status().vcpus;
    if vcpu >= vcpus {
        return refused(
            format!("there is no vCPU {vcpu}; the last is {}", vcpus - 1),
            STATUS_MISUSE,
        );
    }
    let whole = match vm.run_to(vcpu, Point::Steps(count), STEP_PATIENCE) {
        Ok(whole) => whole,
        Err(stop) => return stopped(&stop),
    };
    let place = vm.place(vcpu).unwrap_or_else(|error| error.to_string());
    let made = match whole {
        true => "stepped",
        false => {
            "stopped short: it waits for an interrupt, or comes to user code, which is not stepped"
        }
    };
    Answer::Done(format!("{made}; vCPU {vcpu} is at {place}"))
}

fn look(vm: &mut Vm, view: &View) -> Answer {
    let paused = vm.is_running();
    if let Err(stop) = vm.pause() {
        return stopped(&stop);
    }
    let seen = vm.inspect(view);
    if paused {
        vm.resume();
    }
    match seen {
        Ok(report) => Answer::Seen { report, paused },
        Err(error) => refused(error.to_string(), error.status()),
    }
}

fn stopped(stop: &StopReason) -> Answer {
    refused(format!("the machine stopped: {stop}"), STATUS_FAILURE)
}

fn refused(why: String, status: u8) -> Answer {
    Answer::Refused { why, status }
}

/// Whether a machine of that name runs.
pub fn runs(name: &str) -> bool {
    let path = check_name(name).map(|name| Directory::of_user().socket(&name));
    path.is_ok_and(|path| UnixStream::connect(path).is_ok())
}

/// Checks the name of a machine.
///
/// # Errors
/// If it would not do as the name of a file.
pub fn check_name(name: &str) -> Result<String, String> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty()
        || name.len() > NAME_MAX
        || name.starts_with(['.', '-'])
        || !name.chars().all(good)
    {
        return Err(format!(
            "`{name}` is no name for a machine; use up to {NAME_MAX} letters, digits, `-`, `_` and `.`"
        ));
    }
    Ok(name.into())
}

/// The directory of sockets.
struct Directory(PathBuf);

impl Directory {
    /// The user's: below `XDG_RUNTIME_DIR`, or in `/tmp`.
    fn of_user() -> Self {
        let given = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
        Self(match given.filter(|path| path.is_absolute()) {
            Some(path) => path.join("flukevm"),
            // SAFETY: the call has no arguments and cannot fail.
            None => format!("/tmp/flukevm-{}", unsafe { libc::geteuid() }).into(),
        })
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.0.join(format!("{name}.sock"))
    }

    /// Makes the directory, if there is none, and sees that it is nobody else's.
    fn create(&self) -> Result<(), Error> {
        let Self(path) = self;
        let fail = file_error(path);
        match DirBuilder::new().mode(0o700).create(path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(fail(error)),
            _ => {}
        }
        let about = fs::symlink_metadata(path).map_err(fail)?;
        // SAFETY: the call has no arguments and cannot fail.
        let user = unsafe { libc::geteuid() };
        if !about.is_dir() || about.uid() != user || about.mode() & 0o077 != 0 {
            return Err(Error::Control(format!(
                "`{}` is not a directory that only you can enter; remove it, or set XDG_RUNTIME_DIR",
                path.display()
            )));
        }
        Ok(())
    }

    /// Keeps others from adding and removing sockets until the file is closed.
    fn lock(&self) -> Result<File, Error> {
        let path = self.0.join("lock");
        let file = File::create(&path).and_then(|file| file.lock().map(|()| file));
        file.map_err(file_error(&path))
    }

    /// Names of the machines that have a socket, dead or alive.
    fn names(&self) -> Result<Vec<String>, Error> {
        let Self(path) = self;
        let entries = match fs::read_dir(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries,
        };
        let entries = entries.map_err(file_error(path))?;
        let name = |path: &Path| {
            let socket = path.extension() == Some(OsStr::new("sock"));
            let name = path.file_stem()?.to_str()?;
            (socket && check_name(name).is_ok()).then(|| name.to_string())
        };
        let names = entries.filter_map(|entry| name(&entry.ok()?.path()));
        let mut names: Vec<_> = names.collect();
        names.sort();
        Ok(names)
    }
}

/// For `map_err`: the host refused something with a file.
fn file_error(path: &Path) -> impl Fn(io::Error) -> Error {
    move |error| Error::Control(format!("`{}`: {error}", path.display()))
}

/// Whether nobody listens at a socket any more.
fn is_dead(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::ConnectionRefused
}
