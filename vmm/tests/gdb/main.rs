//! Machines under a debugger: by the protocol itself, by debuggers that misbehave, and by gdb.

mod client;
mod hostile;
mod protocol;
mod real;

use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Child, ChildStderr, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use client::Client;

const FLUKEVM: &str = env!("CARGO_BIN_EXE_flukevm");
/// How long anything may take, on a busy host that emulates.
const PATIENCE: Duration = Duration::from_secs(120);

/// A machine in another process that waits for a debugger.
struct Machine {
    process: Child,
    stderr: BufReader<ChildStderr>,
    /// Where the debugger connects.
    address: String,
    directory: TempDir,
}

impl Machine {
    /// Starts `flukevm run --gdb=SOCKET`, with more arguments.
    fn start(args: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("gdb");
        Self::start_at(directory, socket.to_str().unwrap(), args)
    }

    fn start_at(directory: TempDir, address: &str, args: &[&str]) -> Self {
        let mut command = Command::new(FLUKEVM);
        command.args(["run", "--timeout", "120s"]);
        command.arg(format!("--gdb={address}")).args(args);
        command.env_remove("FLUKEVM_LOG");
        command.env("XDG_RUNTIME_DIR", directory.path());
        command.stdin(Stdio::null());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = command.spawn().unwrap();
        let mut stderr = BufReader::new(process.stderr.take().unwrap());
        let mut line = String::new();
        stderr.read_line(&mut line).unwrap();
        let said =
            line.strip_prefix("flukevm: paused; to debug the machine: gdb -ex 'target remote ");
        let Some(address) = said.and_then(|rest| rest.strip_suffix("'\n")) else {
            panic!("it said {line:?}");
        };
        Self {
            address: address.into(),
            process,
            stderr,
            directory,
        }
    }

    fn connect(&self) -> Client {
        Client::connect(&self.address)
    }

    /// Whether it says of itself that it runs.
    fn is_running(&self) -> bool {
        let mut listing = Command::new(FLUKEVM);
        listing
            .args(["ps", "--json"])
            .env("XDG_RUNTIME_DIR", self.directory.path());
        let machines: Value = serde_json::from_slice(&listing.output().unwrap().stdout).unwrap();
        machines[0]["running"] == true
    }

    /// Asks the machine something as another process would.
    fn ask(&self, command: &str, args: &[&str]) -> Output {
        let pid = self.process.id().to_string();
        let mut asking = Command::new(FLUKEVM);
        asking.arg(command).arg(pid).args(args);
        asking.env("XDG_RUNTIME_DIR", self.directory.path());
        asking.output().unwrap()
    }

    /// Waits for its end: exit status, what the guest printed, and the rest of what flukevm said.
    #[track_caller]
    fn end(mut self) -> (i32, String, String) {
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            match self.process.try_wait().unwrap() {
                Some(status) => break status,
                None if Instant::now() > deadline => panic!("the machine does not end"),
                None => thread::sleep(Duration::from_millis(5)),
            }
        };
        let (mut console, mut said) = (String::new(), String::new());
        let mut stdout = self.process.stdout.take().unwrap();
        stdout.read_to_string(&mut console).unwrap();
        self.stderr.read_to_string(&mut said).unwrap();
        (status.code().unwrap(), console, said)
    }

    /// Ends it as Ctrl-C would.
    #[track_caller]
    fn interrupt(self) -> (i32, String, String) {
        let pid = self.process.id().to_string();
        Command::new("kill").args(["-INT", &pid]).status().unwrap();
        self.end()
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("gdb")
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
