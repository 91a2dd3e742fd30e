//! A kernel that was made slow on purpose is found out when reports are compared. Needs KVM, a host that can count
//! instructions, and the feature `mutants`.

use fluke_abi::mutant::Mutant;

use flukevm::bench::compare::compare;
use flukevm::bench::model::{Report, Settings};
use flukevm::bench::{Job, measure};
use flukevm::config::Configuration;
use flukevm::doctor::{self, Cpl0};

fn report(mutant: Mutant) -> Report {
    let job = Job {
        tables: vec!["primitives".into()],
        configurations: Configuration::ALL.into(),
        settings: Settings {
            quick: true,
            seed: 1,
            reps: 0,
            batches: 1,
            scale: 1,
            period_ns: 20_000_000,
            memtest_bytes: 4096,
            only: "ipc_rpc-same".into(),
        },
        mutant: Some(mutant),
    };
    measure(&job, &|_| {}).unwrap_or_else(|error| panic!("{error}"))
}

#[test]
fn a_slow_transfer_is_found_in_every_configuration() {
    if doctor::probe().unwrap().cpl0 != Cpl0::Emulated {
        eprintln!("this host does not count instructions");
        return;
    }
    let sane = report(Mutant::none);
    let again = compare(&sane, &report(Mutant::none));
    assert!(
        again.compared > 0 && again.changes.is_empty(),
        "{}",
        again.text()
    );
    let slow = compare(&sane, &report(Mutant::slow_transfer));
    assert!(!slow.holds(), "{}", slow.text());
    for configuration in Configuration::ALL {
        let name = configuration.to_string();
        let found = slow.changes.iter().find(|change| change.column == name);
        assert!(
            found.is_some_and(|change| change.is_regression()),
            "{name}: {}",
            slow.text()
        );
    }
    assert!(slow.text().contains("WORSE"), "{}", slow.text());
}
