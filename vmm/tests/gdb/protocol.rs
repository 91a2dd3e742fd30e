//! What the protocol promises.

use std::time::{Duration, Instant};
use std::{fs, thread};

use fluke_abi::entry::Entry;
use fluke_abi::layout::{GATE, GATE_DONE};
use flukevm::count::Ways;
use flukevm::image;

use super::client::{CS, Client, GS_BASE, RAX, RIP, hex};
use super::{FLUKEVM, Machine, PATIENCE};

fn kernel() -> &'static [u8] {
    image::kernel("interrupt").unwrap()
}

fn ways() -> Ways {
    Ways::of(kernel()).unwrap()
}

/// A machine that has come to its first call, with the debugger that has brought it there.
fn at_first_call(args: &[&str]) -> (Machine, Client) {
    let machine = Machine::start(args);
    let mut client = machine.connect();
    client.ok("QCatchSyscalls:1");
    let stopped = client.go();
    assert!(stopped.contains("syscall_entry:"), "{stopped}");
    client.ok("QCatchSyscalls:0");
    (machine, client)
}

#[test]
fn a_machine_waits_for_its_debugger_and_ends_with_the_guests_status() {
    let machine = Machine::start(&["hello", "42"]);
    assert!(machine.socket().exists());
    let mut client = machine.connect();
    assert_eq!(client.ask("?"), "T05thread:01;");
    assert!(
        client.at(0).contains("not set itself up"),
        "{}",
        client.at(0)
    );
    assert_eq!(client.go(), "W2a");
    assert_eq!(client.receive(), None);
    let socket = machine.socket();
    let (status, console, said) = machine.end();
    assert_eq!((status, said.as_str()), (42, ""));
    assert!(console.starts_with("arg 0: hello\n"), "{console}");
    assert!(!socket.exists());
}

#[test]
fn a_machine_that_fails_ends_with_its_status_too() {
    let machine = Machine::start(&["panics"]);
    let mut client = machine.connect();
    let ended = client.go();
    let (status, ..) = machine.end();
    assert!(status > 0);
    assert_eq!(ended, format!("W{status:02x}"));
}

#[test]
fn breakpoints_stop_in_the_kernel_on_the_thread_that_came_there() {
    for model in ["process", "interrupt"] {
        let image = image::kernel(model).unwrap();
        let enter = Ways::of(image).unwrap().enter;
        let machine = Machine::start(&["--model", model, "hello"]);
        let mut client = machine.connect();
        client.ok(&format!("Z0,{enter:x},1"));
        for _ in 0..3 {
            assert_eq!(client.go(), "T05thread:01;swbreak:;");
            assert_eq!(client.register(0, RIP), enter);
            assert_eq!(client.register(0, CS) & 3, 0);
            let at = client.at(0);
            assert!(at.starts_with("kernel: thread "), "{at}");
        }
        client.ok(&format!("z0,{enter:x},1"));
        assert_eq!(client.go(), "W00");
        assert_eq!(machine.end().0, 0);
    }
}

#[test]
fn there_are_four_breakpoints_and_none_where_a_cpu_would_stay() {
    let (machine, mut client) = at_first_call(&["hello"]);
    let Ways {
        trap,
        syscall,
        enter,
        swapgs,
        from_kernel,
        leaving: _,
    } = ways();
    for (address, kind) in [(swapgs, 1), (swapgs + 3, 1), (swapgs, 0)] {
        assert!(
            client
                .ask(&format!("Z{kind},{address:x},1"))
                .starts_with('E')
        );
    }
    for address in [trap, syscall, from_kernel] {
        client.ok(&format!("Z1,{address:x},1"));
    }
    // Catching calls takes two.
    assert!(client.ask("QCatchSyscalls:1").starts_with('E'));
    assert!(client.monitor("catch cond_wait").starts_with("error: "));
    client.ok(&format!("Z0,{enter:x},1"));
    assert!(
        client
            .ask(&format!("Z1,{:x},1", enter + 2))
            .starts_with('E')
    );
    client.ok(&format!("z1,{trap:x},1"));
    client.ok(&format!("Z1,{trap:x},1"));
    assert!(
        client
            .ask(&format!("z1,{:x},1", enter + 2))
            .starts_with('E')
    );
    client.ok("D");
    assert_eq!(machine.end().0, 0);
}

#[test]
fn the_kernel_is_stepped_and_a_program_is_one_step() {
    let (machine, mut client) = at_first_call(&["hello"]);
    let ways = ways();
    let mut here = client.register(0, RIP);
    for _ in 0..20 {
        assert_eq!(client.ask("vCont;s:1"), "T05thread:01;");
        let next = client.register(0, RIP);
        assert_ne!(next, here);
        here = next;
    }
    // From the last instruction that can be stepped off to the way out, and through the program.
    client.ok(&format!("Z1,{:x},1", ways.leaving));
    assert_eq!(client.go(), "T05thread:01;hwbreak:;");
    assert_eq!(client.ask("vCont;s:1;c"), "T05thread:01;");
    assert_eq!(client.register(0, RIP), ways.swapgs);
    assert_eq!(client.ask("vCont;s:1;c"), "T05thread:01;");
    assert_eq!(client.register(0, RIP), ways.enter);
    client.ok(&format!("z1,{:x},1", ways.leaving));
    assert_eq!(client.go(), "W00");
    assert_eq!(machine.end().0, 0);
}

#[test]
fn registers_and_memory_are_read_and_written() {
    let (machine, mut client) = at_first_call(&["hello"]);
    let all = client.ask("g");
    assert_eq!(all.len(), 2 * 536);
    let rip = client.register(0, RIP);
    assert_eq!(all[2 * 128..][..16], hex(&rip.to_le_bytes()));

    // That of the kernel, and one that no CPU has.
    assert!(client.register(0, GS_BASE) > u64::MAX << 32);
    assert_eq!(client.ask("p39"), "x".repeat(16));

    // A register alone, all, and one that is no value of its own.
    let rax = client.register(0, RAX);
    client.ok(&format!(
        "P0={}",
        hex(&0x1234_5678_9abc_def0_u64.to_le_bytes())
    ));
    assert_eq!(client.register(0, RAX), 0x1234_5678_9abc_def0);
    client.ok(&format!("G{all}"));
    assert_eq!((client.register(0, RAX), client.ask("g")), (rax, all));
    assert!(client.ask(&format!("P{CS:x}=30000000")).starts_with('E'));
    assert!(client.ask("P0=1234").starts_with('E'));

    // Text, as in the image; the thread's frame; memory of the program.
    let (elf, _) = image::check_kernel("kernel", kernel()).unwrap();
    let text = elf
        .segments
        .iter()
        .find(|s| (s.va..s.va + s.size).contains(&rip))
        .unwrap();
    let file = text.file.start + (rip - text.va) as usize;
    assert_eq!(client.memory(rip, 64), kernel()[file..file + 64]);
    let frame = client.register(0, 7);
    assert_eq!(client.memory(frame + 8 * 11, 8), GATE.to_le_bytes());
    let old = client.memory(frame, 16);
    client.ok(&format!("M{frame:x},10:{}", hex(&[0x5a; 16])));
    assert_eq!(client.memory(frame, 16), [0x5a; 16]);
    client.ok(&format!("M{frame:x},10:{}", hex(&old)));
    let stack = client.memory(frame + 8 * 14, 8);
    let stack = u64::from_le_bytes(stack.try_into().unwrap());
    assert_eq!(client.memory(stack, 8).len(), 8);

    // Memory that is not there, and a vCPU that is not.
    assert_eq!(client.ask("m0,8"), "E0e");
    assert_eq!(client.ask("M0,1:00"), "E0e");
    assert_eq!(client.ask("mffffffffffffffff,8"), "E0e");
    client.ok("Hg2");
    assert_eq!(
        (client.ask("g").as_str(), client.ask("T2").as_str()),
        ("E03", "E01")
    );
    client.ok("Hg1");
    assert_eq!(client.go(), "W00");
    let (status, console, _) = machine.end();
    assert_eq!((status, console.as_str()), (0, "arg 0: hello\n"));
}

#[test]
fn calls_are_caught_by_number_where_they_begin_and_end() {
    let number = Entry::machine_exit as u16;
    let other = Entry::thread_self as u16;
    let machine = Machine::start(&["calls"]);
    let mut client = machine.connect();
    client.ok(&format!("QCatchSyscalls:1;{other:x};fff"));
    assert_eq!(
        client.go(),
        format!("T05thread:01;syscall_entry:{other:02x};")
    );
    assert_eq!(client.register(0, RIP), ways().enter);
    let at = client.at(0);
    assert!(
        at.contains(", in thread_self(") || at.contains(", about to call thread_self("),
        "{at}"
    );
    assert_eq!(
        client.go(),
        format!("T05thread:01;syscall_return:{other:02x};")
    );
    assert_eq!(client.register(0, RIP), ways().leaving);
    let stack = client.register(0, 7);
    assert_eq!(client.memory(stack + 16, 8), GATE_DONE.to_le_bytes());
    client.ok(&format!("QCatchSyscalls:1;{number:x}"));
    assert_eq!(
        client.go(),
        format!("T05thread:01;syscall_entry:{number:02x};")
    );
    client.ok("QCatchSyscalls:0");
    assert_eq!(client.go(), "W00");
    assert_eq!(machine.end().0, 0);
}

#[test]
fn calls_are_caught_by_name() {
    let machine = Machine::start(&["--vcpus", "2", "stress"]);
    let mut client = machine.connect();
    assert_eq!(client.monitor("catch cond_wait"), "Caught: cond_wait\n");
    for _ in 0..4 {
        let stopped = client.go();
        let cpu = usize::from(stopped.contains("thread:02"));
        assert!(stopped.starts_with("T05thread:0"), "{stopped}");
        let rip = client.register(cpu, RIP);
        if rip == ways().enter {
            assert_eq!(client.register(cpu, RAX) as u16, Entry::cond_wait as u16);
        } else {
            assert_eq!(rip, ways().leaving);
        }
    }
    assert!(client.monitor("catch no_such").starts_with("error: "));
    assert_eq!(client.monitor("uncatch"), "No calls are caught by name.\n");
    assert_eq!(client.go(), "W00");
    assert_eq!(machine.end().0, 0);
}

#[test]
fn every_vcpu_is_a_thread_that_stops_with_the_others() {
    let machine = Machine::start(&["--vcpus", "2", "stress"]);
    let mut client = machine.connect();
    assert_eq!(
        (client.ask("qfThreadInfo"), client.ask("qsThreadInfo")),
        ("m01,02".into(), "l".into())
    );
    let trap = ways().trap;
    client.ok(&format!("Z1,{trap:x},1"));
    let mut seen = [0; 2];
    while seen.contains(&0) {
        let stopped = client.go();
        let cpu = match stopped.as_str() {
            "T05thread:01;hwbreak:;" => 0,
            "T05thread:02;hwbreak:;" => 1,
            other => panic!("{other} after {seen:?}"),
        };
        assert_eq!(client.register(cpu, RIP), trap);
        seen[cpu] += 1;
        // Nothing runs while the machine is stopped.
        let all = |client: &mut Client| [0, 1].map(|cpu| client.register(cpu, RIP));
        let before = all(&mut client);
        thread::sleep(Duration::from_millis(20));
        assert_eq!(all(&mut client), before);
        for at in [client.at(0), client.at(1)] {
            assert!(!at.contains("error"), "{at}");
        }
    }
    client.ok(&format!("z1,{trap:x},1"));
    // One alone.
    let other = client.register(1, RIP);
    assert_eq!(client.ask("vCont;s:1"), "T05thread:01;");
    assert_eq!(client.register(1, RIP), other);
    assert_eq!(client.go(), "W00");
    assert_eq!(machine.end().0, 0);
}

#[test]
fn a_running_machine_is_interrupted_let_go_and_taken_again() {
    let machine = Machine::start(&["spin"]);
    for _ in 0..2 {
        let mut client = machine.connect();
        client.ask("?");
        // Until the program spins.
        loop {
            client.send("c");
            thread::sleep(Duration::from_millis(100));
            client.send_raw(&[3]);
            assert_eq!(client.receive().unwrap(), "T02thread:01;");
            if client.at(0).starts_with("user: thread ") {
                break;
            }
        }
        // Too late for the stop that it is for.
        client.send_raw(&[3]);
        assert!(client.at(0).starts_with("user: thread "));
        client.ok("D");
        assert_eq!(client.receive(), None);
    }
    // One that only hangs up lets it run, too.
    let mut client = machine.connect();
    client.ok(&format!("Z1,{:x},1", ways().enter));
    drop(client);
    let deadline = Instant::now() + PATIENCE;
    while !machine.is_running() {
        assert!(Instant::now() < deadline, "it stays stopped");
        thread::sleep(Duration::from_millis(10));
    }
    let (status, console, said) = machine.interrupt();
    assert_eq!((status, console.as_str()), (130, "spinning\n"));
    assert_eq!(said, "flukevm: interrupted by SIGINT\n");
}

#[test]
fn a_kill_ends_the_machine() {
    let (machine, mut client) = at_first_call(&["spin"]);
    client.send("k");
    let (status, _, said) = machine.end();
    assert_eq!(
        (status, said.as_str()),
        (130, "flukevm: interrupted by gdb\n")
    );
}

#[test]
fn a_machine_ends_by_signal_while_its_debugger_has_it() {
    let (machine, mut client) = at_first_call(&["spin"]);
    assert_eq!(machine.interrupt().0, 130);
    assert_eq!(client.receive(), None);
}

#[test]
fn other_processes_look_but_do_not_touch() {
    let (machine, mut client) = at_first_call(&["--vcpus", "2", "spin"]);
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    let seen = machine.ask("inspect", &["threads"]);
    assert!(
        text(seen.stdout).contains("THREAD"),
        "{}",
        text(seen.stderr)
    );
    for command in ["pause", "resume", "step"] {
        let refused = machine.ask(command, &[]);
        let why = text(refused.stderr);
        assert!(
            why.starts_with("error: a debugger has the machine"),
            "{why}"
        );
        assert_eq!(refused.status.code(), Some(2));
    }
    client.send("vCont;c");
    let seen = machine.ask("inspect", &["cpus"]);
    assert!(text(seen.stdout).contains("CPU"));
    assert!(text(seen.stderr).contains("paused"));
    client.send_raw(&[3]);
    assert_eq!(client.receive().unwrap(), "T02thread:01;");
    assert_eq!(machine.interrupt().0, 130);
}

#[test]
fn views_are_shown_inside_the_debugger() {
    let (_machine, mut client) = at_first_call(&["hello"]);
    for (command, part) in [
        ("threads", "REGISTERS SAY"),
        ("spaces", "space 0"),
        ("objects", "thread"),
        ("cpus", "kernel"),
        ("stack", "enter"),
        ("help", "catch"),
        ("", "Usage"),
        ("nonsense", "error: "),
    ] {
        let said = client.monitor(command);
        assert!(said.contains(part), "{command}: {said}");
    }
}

#[test]
fn the_debugger_reads_the_kernel_image() {
    let machine = Machine::start(&["hello"]);
    let mut client = machine.connect();
    let path = client.ask("qXfer:exec-file:read::0,fff");
    let path = path.strip_prefix('m').unwrap();
    let (opened, size) = (
        client.ask(&format!("vFile:open:{},0,0", hex(path.as_bytes()))),
        kernel().len(),
    );
    let fd = opened.strip_prefix('F').unwrap().to_string();
    let end = client.ask(&format!("vFile:pread:{fd},10,{size:x}"));
    assert_eq!(end, "F00;");
    let magic = client.ask(&format!("vFile:pread:{fd},4,0"));
    assert_eq!(magic, "F04;\u{7f}ELF");
    assert_eq!(client.ask("vFile:close:7f"), "F-1,09");
    assert_eq!(client.ask(&format!("vFile:close:{fd}")), "F0");
    let other = hex(b"/etc/passwd");
    assert_eq!(client.ask(&format!("vFile:open:{other},0,0")), "F-1,02");
    assert_eq!(
        client.ask(&format!("vFile:open:{},1,0", hex(path.as_bytes()))),
        "F-1,1e"
    );
}

#[test]
fn addresses_that_cannot_be_had_are_refused_in_one_line() {
    let refused = |args: &[&str]| {
        let output = std::process::Command::new(FLUKEVM)
            .arg("run")
            .args(args)
            .output()
            .unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(
            (output.status.code(), said.lines().count()),
            (Some(2), 1),
            "{args:?}: {said}"
        );
        said
    };
    assert!(refused(&["--gdb=0.0.0.0:1", "hello"]).contains("loopback"));
    assert!(refused(&["--gdb=nowhere", "hello"]).contains("127.0.0.1:1234"));
    assert!(refused(&["--gdb", "127.0.0.1:1", "hello"]).contains("write --gdb=127.0.0.1:1"));
    assert!(refused(&["--gdb=/no/such/directory/gdb", "hello"]).contains("No such file"));
    assert!(refused(&["--gdb", "--count", "hello"]).contains("--count"));
    assert!(refused(&["--gdb", "--snapshot-to", "x", "hello"]).contains("--snapshot-to"));

    let directory = tempfile::tempdir().unwrap();
    let machine = Machine::start_at(directory, "127.0.0.1:0", &["hello"]);
    assert!(refused(&[&format!("--gdb={}", machine.address), "hello"]).contains("in use"));
    let mut client = machine.connect();
    assert_eq!(client.go(), "W00");
    assert_eq!(machine.end().0, 0);

    let machine = Machine::start(&["spin"]);
    assert!(refused(&[&format!("--gdb={}", machine.address), "hello"]).contains("in use"));
    let file = machine.directory.path().join("file");
    fs::write(&file, "kept").unwrap();
    refused(&[&format!("--gdb={}", file.display()), "hello"]);
    assert_eq!(fs::read(&file).unwrap(), b"kept");
}
