//! gdb itself, as its users have it, in batch mode.

use std::fs;
use std::process::Command;

use super::Machine;

/// Runs gdb with a script against a machine; what it printed.
#[track_caller]
fn gdb(machine: &Machine, script: &str) -> String {
    let path = machine.directory.path().join("script");
    let start = "set pagination off\nset confirm off\nset debuginfod enabled off\n";
    fs::write(
        &path,
        format!("{start}target remote {}\n{script}", machine.address),
    )
    .unwrap();
    let output = Command::new("gdb")
        .args(["-nx", "-batch", "-x"])
        .arg(&path)
        .output();
    let output = output.unwrap_or_else(|error| {
        panic!("gdb: {error}; these tests need it: install it, as by `apt-get install gdb`")
    });
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (printed, complained) = (text(&output.stdout), text(&output.stderr));
    println!("{printed}\n--- on standard error:\n{complained}");
    assert!(output.status.success(), "{}", output.status);
    format!("{printed}{complained}")
}

#[test]
fn gdb_stops_inside_cond_wait_on_a_named_thread() {
    for (model, vcpus) in [("process", "1"), ("interrupt", "2")] {
        let machine = Machine::start(&["--model", model, "--vcpus", vcpus, "stress"]);
        let printed = gdb(
            &machine,
            "hbreak fluke_kernel::entry::cond::cond_wait\n\
             continue\n\
             backtrace\n\
             info threads\n\
             monitor threads\n\
             delete\n\
             continue\n",
        );
        // The image came over the connection.
        assert!(printed.contains("Hardware assisted breakpoint 1 at 0xffffffff"));
        let backtrace = printed.lines().filter(|line| line.starts_with('#'));
        let backtrace: Vec<_> = backtrace.collect();
        assert!(
            backtrace.iter().any(|frame| frame.contains("cond_wait")),
            "{backtrace:?}"
        );
        assert!(
            backtrace
                .iter()
                .any(|frame| frame.contains("boundary::make_call")),
            "{backtrace:?}"
        );
        let current = printed.lines().find(|line| line.starts_with("* ")).unwrap();
        assert!(current.contains("(kernel: thread "), "{current}");
        assert!(current.contains(", in cond_wait(cond 0x"), "{current}");
        // The view agrees.
        let name = current
            .split("(kernel: thread ")
            .nth(1)
            .unwrap()
            .split(',')
            .next()
            .unwrap();
        let row = printed
            .lines()
            .find(|line| line.starts_with(&format!("{name} ")) && line.contains("cond_wait"));
        assert!(
            row.is_some_and(|row| row.contains("running on CPU ")),
            "{row:?}"
        );
        assert!(printed.contains("exited normally"), "{printed}");
        assert_eq!(machine.end().0, 0);
    }
}

#[test]
fn gdb_steps_finishes_and_catches() {
    let machine = Machine::start(&["calls"]);
    let number = fluke_abi::entry::Entry::thread_self as u16;
    let printed = gdb(
        &machine,
        &format!(
            "catch syscall {number}\n\
             continue\n\
             continue\n\
             delete\n\
             hbreak fluke_kernel::boundary::trap\n\
             continue\n\
             next\n\
             stepi\n\
             info registers rip cs eflags\n\
             x/2i $pc\n\
             set $rax = 5\n\
             print $rax\n\
             monitor catch machine_exit\n\
             delete\n\
             continue\n\
             kill\n"
        ),
    );
    assert!(printed.contains(&format!("[{number}])")), "{printed}");
    assert!(
        printed.contains("(call to syscall") && printed.contains("(returned from syscall"),
        "{printed}"
    );
    assert!(printed.contains("Breakpoint 2, "), "{printed}");
    assert!(printed.contains("= 5"), "{printed}");
    assert!(printed.contains("SIGTRAP"), "{printed}");
    assert_eq!(machine.end().0, 130);
}
