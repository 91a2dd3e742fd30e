//! Machines that run in other processes: listing, pausing, stepping and looking into them.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Stdio};

use serde_json::Value;
use tempfile::TempDir;

const FLUKEVM: &str = env!("CARGO_BIN_EXE_flukevm-under-test");

/// A directory for sockets, and the machines in it.
struct Host {
    directory: TempDir,
}

/// How a command ended.
#[derive(Debug)]
struct Ended {
    status: i32,
    stdout: String,
    stderr: String,
}

/// A machine in another process.
struct Machine {
    process: Child,
    _console: BufReader<ChildStdout>,
}

impl Host {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        Self { directory }
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(FLUKEVM);
        let clean = command.args(args).env_remove("FLUKEVM_LOG");
        clean.env("XDG_RUNTIME_DIR", self.directory.path());
        command
    }

    fn run(&self, args: &[&str]) -> Ended {
        let output = self.command(args).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Ended {
            status: output.status.code().unwrap(),
            stdout: text(output.stdout),
            stderr: text(output.stderr),
        }
    }

    #[track_caller]
    fn says(&self, args: &[&str], stdout: &str) {
        let ended = self.run(args);
        assert_eq!(
            (ended.status, ended.stdout.trim_end()),
            (0, stdout),
            "{ended:?}"
        );
    }

    #[track_caller]
    fn refused(&self, args: &[&str], status: i32, line: &str) {
        let ended = self.run(args);
        assert_eq!(ended.stderr, format!("error: {line}\n"));
        assert_eq!((ended.status, ended.stdout.as_str()), (status, ""));
    }

    /// Starts a machine that spins, and waits until its program does.
    fn start(&self, name: &str, args: &[&str]) -> Machine {
        let args = [
            &["run", "--timeout", "120s", "--name", name],
            args,
            &["spin"],
        ]
        .concat();
        let mut command = self.command(&args);
        let mut process = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut console = BufReader::new(process.stdout.take().unwrap());
        let mut line = String::new();
        console.read_line(&mut line).unwrap();
        assert_eq!(line, "spinning\n");
        Machine {
            process,
            _console: console,
        }
    }

    fn machines(&self) -> Value {
        serde_json::from_str(&self.run(&["ps", "--json"]).stdout).unwrap()
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.directory
            .path()
            .join("flukevm")
            .join(format!("{name}.sock"))
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Machine {
    /// Ends it as a user would; its exit status.
    fn end(mut self) -> i32 {
        let pid = self.process.id().to_string();
        Command::new("kill").arg(pid).status().unwrap();
        self.process.wait().unwrap().code().unwrap()
    }
}

#[test]
fn a_machine_is_listed_paused_looked_into_and_resumed() {
    let host = Host::new();
    host.says(&["ps"], "No machine runs.");
    let machine = host.start("a", &["--vcpus", "2", "--model", "process"]);
    let other = host.start("b.2", &[]);
    let machines = host.machines();
    let names: Vec<_> = machines
        .as_array()
        .unwrap()
        .iter()
        .map(|m| &m["name"])
        .collect();
    assert_eq!(names, ["a", "b.2"]);
    assert_eq!(machines[0]["pid"], machine.process.id());
    assert_eq!(
        (&machines[0]["vcpus"], &machines[0]["running"]),
        (&2.into(), &true.into())
    );
    assert_eq!(
        (&machines[0]["kernel"], &machines[0]["program"]),
        (&"process-np".into(), &"spin".into())
    );

    let threads = host.run(&["inspect", "a", "threads"]);
    assert!(
        threads.stdout.contains("waits for a message on pset"),
        "{threads:?}"
    );
    assert!(
        threads.stdout.contains("in ipc_wait_receive(send "),
        "{threads:?}"
    );
    assert_eq!(
        threads.stderr,
        "note: the machine runs; it was paused to be looked at\n"
    );
    assert_eq!(host.machines()[0]["running"], true);

    host.refused(&["step", "a"], 2, "the machine runs; pause it first");
    host.says(&["pause", "a"], "paused");
    host.says(&["pause", "a"], "was paused already");
    assert_eq!(host.machines()[0]["running"], false);
    assert_eq!(host.machines()[1]["running"], true);
    let table = host.run(&["ps"]).stdout;
    assert!(table.contains("paused") && table.contains("b.2"), "{table}");
    let cpus = host.run(&["inspect", "a", "cpus", "--json"]);
    assert_eq!(cpus.stderr, "");
    let before: Value = serde_json::from_str(&cpus.stdout).unwrap();
    assert_eq!(before["rows"].as_array().unwrap().len(), 2);
    let again = host.run(&["inspect", "a", "--json", "cpus"]).stdout;
    assert_eq!(
        serde_json::from_str::<Value>(&again).unwrap(),
        before,
        "it ran while paused"
    );
    for view in [
        "thread 1", "spaces", "spaces 1", "regions", "ports", "psets", "mutexes", "conds",
    ] {
        let args: Vec<_> = ["inspect", "a"]
            .into_iter()
            .chain(view.split(' '))
            .collect();
        let seen = host.run(&args);
        assert!(
            seen.status == 0 && !seen.stdout.is_empty(),
            "{view}: {seen:?}"
        );
    }
    host.says(&["resume", "a"], "runs");
    host.says(&["resume", "a"], "runs already");
    assert_eq!(machine.end(), 130);
    assert_eq!(host.machines().as_array().unwrap().len(), 1);
    assert!(!host.socket("a").exists());
    drop(other);
}

#[test]
fn a_vcpu_steps_while_the_others_stay() {
    let host = Host::new();
    let machine = host.start("m", &["--vcpus", "2"]);
    host.says(&["pause", "m"], "paused");
    let cpus = || -> Value {
        serde_json::from_str(&host.run(&["inspect", "m", "cpus", "--json"]).stdout).unwrap()
    };
    // One spins in user code, the other waits in the kernel; which is which is chance.
    for vcpu in ["0", "1"] {
        let before = cpus();
        let stepped = host.run(&["step", "m", "2", "--vcpu", vcpu]);
        assert!(
            stepped.status == 0 && stepped.stdout.starts_with("st"),
            "{stepped:?}"
        );
        let place = format!("; vCPU {vcpu} is at 0x");
        assert!(stepped.stdout.contains(&place), "{stepped:?}");
        let other = 1 - vcpu.parse::<usize>().unwrap();
        assert_eq!(cpus()["rows"][other]["rip"], before["rows"][other]["rip"]);
    }
    host.refused(
        &["step", "m", "--vcpu", "2"],
        2,
        "there is no vCPU 2; the last is 1",
    );
    // Stepping left no trace: the program still spins.
    host.says(&["resume", "m"], "runs");
    let threads = host.run(&["inspect", "m", "threads"]).stdout;
    assert!(threads.contains("running on CPU"), "{threads}");
    assert_eq!(machine.end(), 130);
}

#[test]
fn a_saved_machine_is_looked_into_and_a_paused_one_is_saved_and_stays_paused() {
    let host = Host::new();
    let saved = host.directory.path().join("saved");
    let saved = saved.to_str().unwrap();
    let machine = host.start("m", &["--snapshot-to", saved, "--snapshot-after", "2s"]);
    host.says(&["pause", "m"], "paused");
    let live = host.run(&["inspect", "m", "threads"]);
    let mut tries = 0..600;
    let seen = loop {
        let seen = host.run(&["inspect", saved, "threads"]);
        if seen.status == 0 {
            break seen;
        }
        assert!(tries.next().is_some(), "{seen:?}");
        std::thread::sleep(std::time::Duration::from_millis(50));
    };
    assert_eq!(seen.stdout, live.stdout);
    assert_eq!(host.machines()[0]["running"], false);
    host.refused(
        &["inspect", saved, "stack", "7"],
        2,
        "there is no CPU 7; the last is 0",
    );
    // A name and a directory are told apart.
    host.refused(
        &["resume", "--stats", "m"],
        2,
        "the options of resume are for saved machines; write `./m` if that is a directory",
    );
    host.says(&["resume", "m"], "runs");
    let rest = host.run(&["resume", "--timeout", "1s", "--name", "again", saved]);
    assert_eq!(rest.status, 124, "{rest:?}");
    assert_eq!(machine.end(), 130);
}

#[test]
fn what_cannot_be_is_refused_on_one_line() {
    let host = Host::new();
    let machine = host.start("m", &[]);
    let none = "no machine named `n` runs; `flukevm ps` lists those that do";
    for args in [
        &["pause", "n"][..],
        &["inspect", "n", "cpus"],
        &["step", "n"],
    ] {
        host.refused(args, 2, none);
    }
    host.refused(
        &["pause", "../m"],
        2,
        "`../m` is no name for a machine; use up to 48 letters, digits, `-`, `_` and `.`",
    );
    host.refused(
        &["run", "--name", "m", "hello"],
        2,
        "a machine named `m` runs already; give another --name",
    );
    host.refused(
        &["inspect", "m", "thread", "99"],
        2,
        "there is no thread 99; see the view `threads`",
    );
    host.refused(
        &["inspect", "m", "stack", "7"],
        2,
        "there is no CPU 7; the last is 0",
    );
    let misparsed = host.run(&["inspect", "m", "code", "0xg"]);
    assert_eq!(
        (misparsed.status, misparsed.stderr.lines().count()),
        (2, 1),
        "{misparsed:?}"
    );
    assert_eq!(machine.end(), 130);
}

#[test]
fn a_dead_machines_socket_is_cleared_away() {
    let host = Host::new();
    // Killed, it cannot tidy up.
    drop(host.start("dead", &[]));
    assert!(host.socket("dead").exists());
    host.refused(
        &["pause", "dead"],
        2,
        "no machine named `dead` runs; `flukevm ps` lists those that do",
    );
    host.says(&["ps"], "No machine runs.");
    assert!(!host.socket("dead").exists());
    drop(host.start("dead", &[]));
    let machine = host.start("dead", &[]);
    assert_eq!(host.machines()[0]["pid"], machine.process.id());
}

#[test]
fn a_machine_without_a_name_has_the_number_of_its_process() {
    let host = Host::new();
    let args = ["run", "--timeout", "120s", "spin"];
    let mut process = host.command(&args).stdout(Stdio::piped()).spawn().unwrap();
    let mut console = BufReader::new(process.stdout.take().unwrap());
    console.read_line(&mut String::new()).unwrap();
    let name = process.id().to_string();
    host.says(&["pause", &name], "paused");
    process.kill().unwrap();
    process.wait().unwrap();
}

#[test]
fn a_directory_that_others_can_enter_is_refused() {
    use std::os::unix::fs::PermissionsExt;
    let host = Host::new();
    let directory = host.directory.path().join("flukevm");
    fs::create_dir(&directory).unwrap();
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o777)).unwrap();
    let why = format!(
        "`{}` is not a directory that only you can enter; remove it, or set XDG_RUNTIME_DIR",
        directory.display()
    );
    host.refused(&["run", "--name", "m", "hello"], 1, &why);
    // Nobody asked to be reachable: the machine runs all the same.
    let ran = host.run(&["run", "hello"]);
    assert_eq!((ran.status, ran.stderr.as_str()), (0, ""), "{ran:?}");
}

#[test]
fn clients_that_misbehave_hurt_nobody() {
    let host = Host::new();
    let machine = host.start("m", &[]);
    let connect = || UnixStream::connect(host.socket("m")).unwrap();
    let answer = |request: &[u8]| {
        let mut stream = connect();
        stream.write_all(request).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    };
    let text = answer(b"nonsense\n\"status\"\n");
    let lines: Vec<_> = text.lines().collect();
    assert!(lines[0].contains("not a request: "), "{text}");
    assert!(lines[1].contains(r#""running":true"#), "{text}");
    assert!(answer(b"\"status\"").contains("does not end with its line"));
    // Turned away with most of it unread, which may reset the connection before the answer is read.
    let _ = connect().write_all(&[b'x'; 1_000_000]);
    assert!(answer(b"\xff\xfe\n").contains("not a request"));
    assert!(answer(br#"{"step":{"vcpu":-1,"count":1}}"#).contains("not a request"));
    assert_eq!(answer(b""), "");
    // Gone before the answer, gone in the middle of a line, and silent.
    for _ in 0..20 {
        connect().write_all(b"{\"inspect\":\"threads\"}\n").unwrap();
        connect().write_all(b"{\"insp").unwrap();
    }
    let silent: Vec<_> = (0..8).map(|_| connect()).collect();
    host.says(&["pause", "m"], "paused");
    drop(silent);
    host.says(&["resume", "m"], "runs");
    assert_eq!(machine.end(), 130);
}
