//! One QEMU: its command line, its five output channels, its end.
//!
//! The channels are Unix sockets of the lab's that QEMU connects to: the kernel's console (a
//! serial port), the three virtio-serial ports of `init.sh`, and one for a file that the command writes. So
//! its stdout, its stderr, its exit status and the kernel's messages never mix.

use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread::{self, JoinHandle, sleep};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::debian::QEMU;

/// Names of the channels; all but the first are virtio-serial ports, in the order of their numbers.
const CHANNELS: [&str; 5] = ["console", "stdout", "stderr", "status", "file"];

/// What the machine is made of.
pub struct Machine<'a> {
    /// The kernel to boot.
    pub kernel: &'a Path,
    /// Its initramfs.
    pub initramfs: &'a Path,
    /// Number of CPUs.
    pub cpus: u32,
    /// Memory, in QEMU's spelling.
    pub memory: &'a str,
    /// Whether guest time counts instructions.
    pub icount: bool,
}

/// What the lab's `/init` says.
pub enum Event {
    /// The command starts: `/dev/kvm` is there.
    Ready,
    /// The command ended with this status.
    Exit(u8),
    /// The lab itself failed.
    Broken(String),
}

/// A running QEMU. It is killed when this is dropped, and by the kernel when the lab's process
/// ends in any other way.
pub struct Qemu {
    child: Child,
    events: Receiver<Event>,
    output: Vec<JoinHandle<()>>,
    console: Option<JoinHandle<Vec<u8>>>,
    file: Option<JoinHandle<Vec<u8>>>,
    complaints: Option<JoinHandle<Vec<u8>>>,
}

impl Qemu {
    /// Starts QEMU. Call it on the main thread: QEMU is bound to the life of the caller's.
    pub fn start(machine: &Machine, directory: &Path) -> Result<Qemu> {
        let mut listeners = Vec::new();
        for name in CHANNELS {
            let listener = UnixListener::bind(directory.join(name))?;
            listener.set_nonblocking(true)?;
            listeners.push(listener);
        }
        let mut command = command(machine, directory);
        fs::write(directory.join("command"), format!("{command:?}\n"))?;
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot start QEMU (by setpriv, of Debian's util-linux)")?;
        let complaints = child
            .stderr
            .take()
            .map(|pipe| thread::spawn(|| drain(pipe)));
        let (sender, events) = channel();
        let mut qemu = Qemu {
            child,
            events,
            output: Vec::new(),
            console: None,
            file: None,
            complaints,
        };
        let [console, stdout, stderr, status, file] = &listeners[..] else {
            unreachable!("as many listeners as channels");
        };
        let console = qemu.accept(console)?;
        let (stdout, stderr) = (qemu.accept(stdout)?, qemu.accept(stderr)?);
        let (status, file) = (qemu.accept(status)?, qemu.accept(file)?);
        qemu.file = Some(thread::spawn(|| drain(file)));
        qemu.console = Some(thread::spawn(|| drain(console)));
        qemu.output = vec![
            thread::spawn(|| copy(stdout, std::io::stdout())),
            thread::spawn(|| copy(stderr, std::io::stderr())),
        ];
        thread::spawn(move || {
            for line in BufReader::new(status).lines().map_while(Result::ok) {
                if sender.send(event(&line)).is_err() {
                    break;
                }
            }
        });
        Ok(qemu)
    }

    /// What `/init` says; disconnected when QEMU has ended.
    pub fn events(&self) -> &Receiver<Event> {
        &self.events
    }

    /// Ends QEMU and waits until all output has been passed on.
    pub fn finish(&mut self) {
        self.kill();
        for copier in self.output.drain(..) {
            // A thread that panicked has printed why.
            let _ = copier.join();
        }
    }

    /// Ends QEMU and returns the file that the command has written, if it was asked for.
    pub fn file(&mut self) -> Vec<u8> {
        self.finish();
        let file = self.file.take().map(JoinHandle::join);
        file.and_then(Result::ok).unwrap_or_default()
    }

    /// Ends QEMU and returns what it and the kernel had to say.
    pub fn last_words(&mut self) -> String {
        self.finish();
        let mut words = String::new();
        for speaker in [self.complaints.take(), self.console.take()]
            .into_iter()
            .flatten()
        {
            let bytes = speaker.join().unwrap_or_default();
            for line in String::from_utf8_lossy(&bytes).lines() {
                // What the emulated CPU model lacks is always the same, and no matter.
                if !line.contains("TCG doesn't support requested feature") {
                    words.push_str(line);
                    words.push('\n');
                }
            }
        }
        words
    }

    /// Waits for QEMU to connect to a channel.
    fn accept(&mut self, listener: &UnixListener) -> Result<UnixStream> {
        loop {
            match listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(false)?;
                    return Ok(stream);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error).context("a channel of QEMU's is broken"),
            }
            if let Some(status) = self.child.try_wait()? {
                bail!(
                    "QEMU does not start ({status}): {}",
                    self.last_words().trim()
                );
            }
            sleep(Duration::from_millis(5));
        }
    }

    fn kill(&mut self) {
        // Both fail only if QEMU has already ended and been waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        self.kill();
    }
}

fn command(machine: &Machine, directory: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command
        .args([
            "--pdeathsig",
            "KILL",
            QEMU,
            "-nodefaults",
            "-no-user-config",
        ])
        .args(["-display", "none", "-no-reboot", "-cpu", "EPYC,+svm,+npt"])
        // One thread takes turns on all CPUs. With a thread each, QEMU 7.2 loses an interrupt
        // somewhere in its emulation of SVM, and one run in seven hangs in Linux for ever.
        .args(["-accel", "tcg,thread=single"])
        .args(["-smp", &machine.cpus.to_string(), "-m", machine.memory])
        .args(["-device", "virtio-serial-pci"])
        .arg("-kernel")
        .arg(machine.kernel)
        .arg("-initrd")
        .arg(machine.initramfs)
        .args([
            "-append",
            "console=ttyS0 quiet panic=-1 random.trust_cpu=on",
        ]);
    if machine.icount {
        command.args(["-icount", "shift=0"]);
    }
    for (number, name) in CHANNELS.iter().enumerate() {
        let path = directory.join(name);
        let socket = format!("socket,id={name},path={}", path.display());
        command.args(["-chardev", &socket]);
        if number == 0 {
            command.args(["-serial", &format!("chardev:{name}")]);
        } else {
            let port = format!("virtserialport,chardev={name},nr={number}");
            command.args(["-device", &port]);
        }
    }
    command
}

fn event(line: &str) -> Event {
    match line.split_once(' ') {
        None if line == "ready" => Event::Ready,
        Some(("exit", status)) if status.parse::<u8>().is_ok() => {
            Event::Exit(status.parse().unwrap_or_default())
        }
        Some(("broken", reason)) => Event::Broken(reason.to_string()),
        _ => Event::Broken(format!("/init says {line:?}")),
    }
}

/// Reads to the end, or to the error that a killed QEMU may leave instead of one.
fn drain(mut from: impl Read) -> Vec<u8> {
    let mut bytes = Vec::new();
    let _ = from.read_to_end(&mut bytes);
    bytes
}

/// Passes on what comes, at once. A closed output does not stop the command, as its exit status
/// is still wanted.
fn copy(mut from: impl Read, mut to: impl Write) {
    let mut buffer = [0; 16 * 1024];
    while let Ok(length) = from.read(&mut buffer) {
        if length == 0 {
            break;
        }
        let _ = to.write_all(&buffer[..length]).and_then(|()| to.flush());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn init_is_understood() {
        assert!(matches!(event("ready"), Event::Ready));
        assert!(matches!(event("exit 42"), Event::Exit(42)));
        assert!(matches!(event("broken no kvm"), Event::Broken(why) if why == "no kvm"));
        for nonsense in ["", "exit", "exit 256", "exit x"] {
            assert!(matches!(event(nonsense), Event::Broken(_)), "{nonsense:?}");
        }
    }
}
