//! The other side: commands that ask machines.

use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use comfy_table::{Table, presets};
use serde::Serialize;

use super::{Answer, Directory, Request, Status, is_dead};
use crate::config::Size;
use crate::error::Error;

/// How long a machine may take to answer.
const PATIENCE: Duration = Duration::from_secs(30);
/// The same where many are asked what they are.
const PATIENCE_OF_MANY: Duration = Duration::from_secs(2);

/// A machine, as `flukevm ps` lists it.
#[derive(Serialize)]
pub struct Listed {
    /// Its name.
    name: String,
    /// What it is; none if it does not answer.
    #[serde(flatten)]
    status: Option<Status>,
}

/// Asks a machine for something.
///
/// # Errors
/// If there is no such machine, or it does not answer. That it refuses is an answer.
pub fn ask(name: &str, request: &Request) -> Result<Answer, Error> {
    let name = super::check_name(name).map_err(Error::Config)?;
    let found = UnixStream::connect(Directory::of_user().socket(&name));
    let stream = found.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Error::Config(format!(
            "no machine named `{name}` runs; `flukevm ps` lists those that do"
        )),
        _ => Error::Control(format!("machine `{name}`: {error}")),
    })?;
    let answer = talk(&stream, request, PATIENCE);
    answer.map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock => Error::Control(format!(
            "machine `{name}` does not answer; its process may be stopped"
        )),
        io::ErrorKind::UnexpectedEof
        | io::ErrorKind::BrokenPipe
        | io::ErrorKind::ConnectionReset => {
            Error::Control(format!("machine `{name}` ended before it answered"))
        }
        _ => Error::Control(format!("machine `{name}`: {error}")),
    })
}

fn talk(mut stream: &UnixStream, request: &Request, patience: Duration) -> io::Result<Answer> {
    stream.set_read_timeout(Some(patience))?;
    stream.set_write_timeout(Some(patience))?;
    let mut text = serde_json::to_vec(request)?;
    text.push(b'\n');
    stream.write_all(&text)?;
    let mut line = Vec::new();
    BufReader::new(stream).read_until(b'\n', &mut line)?;
    if !line.ends_with(b"\n") {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    serde_json::from_slice(&line).map_err(|error| {
        let why = format!("it answers in another way ({error}); is it of another version?");
        io::Error::other(why)
    })
}

/// All machines of this user. Sockets of those that are dead are removed.
///
/// # Errors
/// If their directory cannot be read.
pub fn list() -> Result<Vec<Listed>, Error> {
    let directory = Directory::of_user();
    let mut machines = Vec::new();
    for name in directory.names()? {
        let path = directory.socket(&name);
        let status = match UnixStream::connect(&path) {
            Ok(stream) => match talk(&stream, &Request::Status, PATIENCE_OF_MANY) {
                Ok(Answer::Status(status)) => Some(status),
                _ => None,
            },
            Err(error) => {
                if is_dead(&error) {
                    // Under the lock nobody can take the name; somebody may have before.
                    let _lock = directory.lock()?;
                    if UnixStream::connect(&path).is_err_and(|error| is_dead(&error)) {
                        // Gone already is as good.
                        let _ = fs::remove_file(&path);
                    }
                }
                continue;
            }
        };
        machines.push(Listed { name, status });
    }
    Ok(machines)
}

/// A list of machines for people.
pub fn table(machines: &[Listed]) -> String {
    if machines.is_empty() {
        return "No machine runs.".into();
    }
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header([
        "NAME", "PID", "STATE", "VCPUS", "MEMORY", "KERNEL", "PROGRAM", "AGE",
    ]);
    for Listed { name, status } in machines {
        let Some(status) = status else {
            table.add_row([name.as_str(), "?", "does not answer"]);
            continue;
        };
        let or_dash = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".into());
        let age = Duration::from_secs(status.age_ms / 1000);
        table.add_row([
            name.clone(),
            status.pid.to_string(),
            if status.running { "running" } else { "paused" }.into(),
            status.vcpus.to_string(),
            Size(status.memory).to_string(),
            or_dash(&status.kernel),
            or_dash(&status.program),
            humantime::format_duration(age).to_string(),
        ]);
    }
    table
        .lines()
        .map(|line| format!("{}\n", line.trim()))
        .collect()
}
