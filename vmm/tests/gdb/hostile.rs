//! Debuggers that misbehave: whatever they send, the machine runs on, and the next one can debug it.

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use super::Machine;
use super::client::framed;

/// Beginnings of packets that are understood, among them such as change the machine.
const BEGINNINGS: [&str; 34] = [
    "?",
    "g",
    "G",
    "p",
    "P",
    "m",
    "M",
    "X",
    "c",
    "s",
    "C",
    "vCont;",
    "vCont;c:",
    "vCont;s:1;r",
    "vCont?",
    "Z0,",
    "Z1,",
    "Z2,",
    "Z4,",
    "z1,",
    "Hg",
    "Hc",
    "T",
    "qSupported:",
    "qXfer:features:read:",
    "qXfer:exec-file:read::",
    "vFile:open:",
    "vFile:pread:3,",
    "vFile:fstat:",
    "qRcmd,",
    "QCatchSyscalls:1;",
    "qThreadExtraInfo,",
    "QStartNoAckMode",
    "vKill",
];

fn garbage() -> impl Strategy<Value = Vec<u8>> {
    let tail = prop_oneof![
        "[0-9a-f]{0,20}",
        "[0-9a-f]{1,16},[0-9a-f]{1,16}(:[0-9a-f]{0,32})?",
        "[ -~]{0,40}",
    ];
    let beginnings: Vec<_> = BEGINNINGS.iter().filter(|b| **b != "vKill").collect();
    let packet = (prop::sample::select(beginnings), tail)
        .prop_map(|(beginning, tail)| framed(format!("{beginning}{tail}").as_bytes()));
    let noise = prop::collection::vec(any::<u8>(), 0..64)
        .prop_filter("a kill", |bytes| !bytes.windows(2).any(|two| two == b"$k"));
    let bytes = prop_oneof![8 => packet, 1 => noise, 1 => Just(vec![3]), 1 => Just(b"+".to_vec())];
    prop::collection::vec(bytes, 1..12).prop_map(|parts| parts.concat())
}

#[test]
fn a_machine_outlives_debuggers_that_send_garbage() {
    let machine = Machine::start(&["--quiet", "spin"]);
    let config = Config {
        cases: 200,
        failure_persistence: None,
        ..Config::default()
    };
    TestRunner::new(config)
        .run(&garbage(), |bytes| {
            let mut client = machine.connect();
            client.send_raw(&bytes);
            drop(client);
            let mut client = machine.connect();
            prop_assert_eq!(client.ask("?"), "T05thread:01;");
            client.ok("D");
            Ok(())
        })
        .unwrap();
}

#[test]
fn a_machine_outlives_debuggers_that_take_no_answers() {
    let machine = Machine::start(&["--quiet", "spin"]);
    let mut client = machine.connect();
    // Answers of 20 MB, which no socket keeps.
    let packet = framed(b"qXfer:features:read:target.xml:0,fff");
    for _ in 0..100_000 {
        if !client.send_raw(&packet) {
            break;
        }
    }
    drop(client);
    let mut client = machine.connect();
    assert_eq!(client.ask("?"), "T05thread:01;");
    // A packet that never ends.
    while client.send_raw(&[b'$'; 4096]) {}
    let mut client = machine.connect();
    assert_eq!(client.ask("?"), "T05thread:01;");
    client.send("k");
    assert_eq!(machine.end().0, 130);
}

#[test]
fn one_who_says_nothing_starts_nothing() {
    let machine = Machine::start(&["hello"]);
    drop(machine.connect());
    let mut client = machine.connect();
    assert!(client.at(0).contains("not set itself up"));
    client.ok("D");
    assert_eq!(machine.end().0, 0);
}
