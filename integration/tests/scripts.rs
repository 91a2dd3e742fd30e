//! What `flukevm test` says of scripts that pass, fail, never end, or are none.

use std::fs;
use std::process::{Command, Output};

use tempfile::TempDir;

struct Scripts(TempDir);

impl Scripts {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn write(&self, name: &str, text: &str) -> String {
        let path = self.0.path().join(name);
        fs::write(&path, text).unwrap();
        path.to_str().unwrap().into()
    }
}

fn test(args: &[&str]) -> (Option<i32>, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_flukevm-under-test"));
    let command = command.arg("test").args(args).env_remove("FLUKEVM_LOG");
    let Output {
        status,
        stdout,
        stderr,
    } = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code(), text(stdout), text(stderr))
}

#[test]
fn scripts_that_are_none_are_misuse() {
    let scripts = Scripts::new();
    let broken = scripts.write("broken.rhai", "let x = 1;\nlet y = ;\n");
    let (status, stdout, stderr) = test(&[&broken]);
    assert_eq!((status, stdout.as_str()), (Some(2), ""));
    assert!(
        stderr.starts_with(&format!("error: {broken}:2: ")),
        "{stderr}"
    );
    assert_eq!(stderr.lines().count(), 1, "{stderr}");

    let (status, _, stderr) = test(&["/nowhere.rhai"]);
    assert_eq!(status, Some(2));
    assert!(
        stderr.starts_with("error: cannot read `/nowhere.rhai`"),
        "{stderr}"
    );
    let (status, _, stderr) = test(&[
        scripts.0.path().to_str().unwrap(),
        "--filter",
        "no such name",
    ]);
    assert_eq!(status, Some(2));
    assert!(
        stderr.starts_with("error: no script of that name"),
        "{stderr}"
    );
    let (status, ..) = test(&["--model", "interrupt", "--preempt", "full", &broken]);
    assert_eq!(status, Some(2));
}

#[test]
fn a_failure_shows_the_line_the_view_and_the_command() {
    let scripts = Scripts::new();
    let path = scripts.write(
        "fails.rhai",
        "let vm = machine(#{program: \"spin\"});\n\
         let hit = vm.run_until(exit(\"thread_set_state\"));\n\
         assert_eq(vm.thread(hit.thread).call.status, \"NoMemory\");\n",
    );
    let (status, stdout, _) = test(&["--model", "process", &path]);
    assert_eq!(status, Some(1), "{stdout}");
    for part in [
        "FAILED",
        &format!("{path}:3: assertion failed: \"0x0\" is not \"NoMemory\"\n"),
        "  | assert_eq(vm.thread(hit.thread).call.status, \"NoMemory\");\n",
        "The machine, thread ",
        "done: 0x0\n",
        &format!("Again: flukevm test --model process --preempt none --vcpus 1 {path}\n"),
    ] {
        assert!(stdout.contains(part), "no {part:?} in:\n{stdout}");
    }

    // The same for programs.
    let (status, stdout, _) = test(&["--json", &path]);
    assert_eq!(status, Some(1));
    let lines: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(lines[0]["passed"], false);
    assert_eq!(lines[0]["configuration"], "interrupt-np");
}

#[test]
fn no_script_hangs() {
    let scripts = Scripts::new();
    let turns = scripts.write("turns.rhai", "let n = 0;\nloop { n += 1; }\n");
    let (status, stdout, _) = test(&["--timeout", "1s", &turns]);
    assert_eq!(status, Some(1));
    assert!(stdout.contains(":2: it took longer than 1s"), "{stdout}");

    let waits = scripts.write(
        "waits.rhai",
        "let vm = machine(#{program: \"spin\"});\nvm.run_until(wait(\"region_search\"), \"300ms\");\n",
    );
    let (status, stdout, _) = test(&[&waits]);
    assert_eq!(status, Some(1));
    assert!(
        stdout.contains("waits.rhai:2: not within 300ms: wait in region_search\n"),
        "{stdout}"
    );

    let ends = scripts.write(
        "ends.rhai",
        "let vm = machine(#{program: \"hello\"});\nvm.run_until(wait(\"region_search\").count(99));\n",
    );
    let (status, stdout, _) = test(&[&ends]);
    assert_eq!(status, Some(1));
    let why =
        "ends.rhai:2: the guest exited with status 0, before: wait in region_search, time 99\n";
    assert!(stdout.contains(why), "{stdout}");
}

#[test]
fn what_does_not_exist_is_said_by_name() {
    let scripts = Scripts::new();
    for (line, why) in [
        ("enter(\"fly\")", "there is no entry point `fly`"),
        (
            "machine(#{program: \"fly\"})",
            "no program of that name is built in",
        ),
        (
            "machine(#{program: \"spin\", wings: 2})",
            "machines have no option `wings`",
        ),
        ("vm.view(\"sky\")", "there is no view `sky`"),
        ("vm.thread(9999)", "there is no thread 9999"),
        (
            "vm.run_until(wait().thread(9999))",
            "there is no thread 9999",
        ),
        (
            "vm.run_until(symbol(\"fly\"))",
            "the kernel has no function `fly`",
        ),
        (
            "vm.run_until(line(\"fly.rs\", 1))",
            "the kernel has no code of line 1 of a file `fly.rs`",
        ),
        ("vm.run_until(write(99, 0, 1))", "there is no space 99"),
        ("vm.run_until(physical_write(-1, 1))", "bytes are too many"),
        ("vm.run_until(7)", "Function not found: run_until"),
        (
            "vm.set_register(0, \"xax\", 1)",
            "there is no register `xax`",
        ),
        ("vm.registers(7)", "there is no vCPU 7"),
        ("vm.inject(7, 32)", "there is no vCPU 7"),
        ("vm.inject(0, 3)", "3 is no vector of interrupts"),
        ("vm.step(7, 1)", "there is no vCPU 7"),
    ] {
        let text =
            format!("let vm = machine(#{{program: \"spin\"}});\nvm.run_until(exit());\n{line};\n");
        let path = scripts.write("names.rhai", &text);
        let (status, stdout, stderr) = test(&[&path]);
        assert_eq!(status, Some(1), "{line}: {stdout}{stderr}");
        let line = stdout.lines().nth(1).unwrap_or_default();
        assert!(
            line.starts_with(&format!("{path}:3: ")) && line.contains(why),
            "{stdout}"
        );
    }
}
