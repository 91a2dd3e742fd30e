//! One run of a contender, and when what happened.

use std::io::Read;
use std::process::{Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::contender::{Contender, FLUKEVM_LOG, OUTPUT};

/// Times from the start of the process.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// Until the first user-mode instruction; none of a program that boots no guest.
    pub first_user: Option<Duration>,
    /// Until the first line of output could be read.
    pub output: Duration,
    /// Until the process had ended.
    pub exit: Duration,
}

/// What a channel of the process has said.
struct Said {
    /// Whether it is standard output.
    stdout: bool,
    bytes: Vec<u8>,
    /// When what was looked for had come.
    seen: Option<Instant>,
}

/// Runs it once. An error if it did not do what it should, within `limit`.
pub fn run(contender: &Contender, limit: Duration) -> Result<Times> {
    let start = Instant::now();
    let mut child = Command::new(&contender.program)
        .args(&contender.args)
        .env("FLUKEVM_LOG", FLUKEVM_LOG)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {}", contender.program.display()))?;
    let (sender, channels) = channel();
    if let (Some(stdout), Some(stderr)) = (child.stdout.take(), child.stderr.take()) {
        let marker = contender.marker.unwrap_or_default();
        listen(stdout, true, b"\n", sender.clone());
        listen(stderr, false, marker, sender);
    }
    let (mut out, mut err) = (None, None);
    // Both close when the process ends.
    while out.is_none() || err.is_none() {
        let left = limit.saturating_sub(start.elapsed());
        match channels.recv_timeout(left) {
            Ok(said) if said.stdout => out = Some(said),
            Ok(said) => err = Some(said),
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                child.kill()?;
                child.wait()?;
                bail!("not finished after {limit:?}");
            }
        }
    }
    let status = child.wait()?;
    let exit = start.elapsed();
    let (out, err) = out.zip(err).context("its output was lost")?;
    let console = String::from_utf8_lossy(&out.bytes);
    let complaint = || {
        let complaints = String::from_utf8_lossy(&err.bytes);
        let mut lines = console.lines().chain(complaints.lines());
        let last = lines.rfind(|line| !line.trim().is_empty());
        last.unwrap_or("it said nothing").to_string()
    };
    ensure!(
        status.code() == Some(contender.status),
        "ended with {status}: {}",
        complaint()
    );
    let since = |at: Instant| at.duration_since(start);
    let first_user = match contender.marker {
        Some(_) => {
            ensure!(console == OUTPUT, "printed {console:?}, not {OUTPUT:?}");
            let seen = err.seen.context("did not tell when its guest was up")?;
            Some(since(seen))
        }
        None => None,
    };
    Ok(Times {
        first_user,
        output: since(out.seen.context("printed no line")?),
        exit,
    })
}

/// Reads to the end, and looks for `marker`.
fn listen(
    mut from: impl Read + Send + 'static,
    stdout: bool,
    marker: &'static [u8],
    to: Sender<Said>,
) {
    thread::spawn(move || {
        let mut said = Said {
            stdout,
            bytes: Vec::new(),
            seen: None,
        };
        let mut buffer = [0; 4096];
        while let Ok(length @ 1..) = from.read(&mut buffer) {
            let now = Instant::now();
            said.bytes.extend_from_slice(&buffer[..length]);
            if said.seen.is_none() && contains(&said.bytes, marker) {
                said.seen = Some(now);
            }
        }
        // Nobody waits any more if the time was up.
        let _ = to.send(said);
    });
}

fn contains(bytes: &[u8], marker: &[u8]) -> bool {
    !marker.is_empty() && bytes.windows(marker.len()).any(|window| window == marker)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, marker: Option<&'static [u8]>) -> Result<Times> {
        let contender = Contender {
            name: "sh",
            program: "/bin/sh".into(),
            args: ["-c", script].map(String::from).to_vec(),
            status: 1,
            marker,
            needed: true,
        };
        run(&contender, Duration::from_secs(5))
    }

    #[test]
    fn times_come_in_their_order() {
        let script = "echo x up >&2; sleep 0.05; echo 'arg 0: hello'; sleep 0.05; exit 1";
        let times = shell(script, Some(b" up")).unwrap();
        let up = times.first_user.unwrap();
        let step = Duration::from_millis(40);
        assert!(up + step < times.output, "{times:?}");
        assert!(times.output + step < times.exit, "{times:?}");
    }

    #[test]
    fn what_went_wrong_is_said() {
        let why = |script| shell(script, Some(b"up")).unwrap_err().to_string();
        assert_eq!(
            why("echo no KVM >&2; exit 3"),
            "ended with exit status: 3: no KVM"
        );
        assert!(why("echo up >&2; echo no; exit 1").starts_with("printed \"no\\n\""));
        assert!(why("echo 'arg 0: hello'; exit 1").starts_with("did not tell"));
        let slow = Contender {
            args: ["-c", "exec sleep 60"].map(String::from).to_vec(),
            ..Contender::version("sh", "/bin/sh".as_ref())
        };
        let error = run(&slow, Duration::from_millis(50)).unwrap_err();
        assert_eq!(error.to_string(), "not finished after 50ms");
    }
}
