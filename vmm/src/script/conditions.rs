//! Pause conditions in scripts.

use fluke_abi::entry::{Entry, TABLE};
use fluke_abi::probe::Probe;
use rhai::Engine;

use super::Fallible;
use crate::condition::{Condition, Place, Who};

/// An entry point by its name.
fn entry(name: &str) -> Fallible<Entry> {
    let found = TABLE.iter().find(|row| row.name == name);
    let entry = found.and_then(|row| Entry::from_number(row.number));
    Ok(entry.ok_or_else(|| format!("there is no entry point `{name}`; see `flukevm api`"))?)
}

/// Registers what makes conditions.
pub fn register(engine: &mut Engine) {
    engine.register_type_with_name::<Condition>("Condition");
    for &probe in Probe::ALL {
        engine.register_fn(probe.name(), move || Condition::probe(probe));
        engine.register_fn(probe.name(), move |name: &str| -> Fallible<Condition> {
            Ok(Condition::probe(probe).call(entry(name)?))
        });
    }
    engine
        .register_fn("address", |address: i64| {
            Condition::place(Place::Address(address as u64))
        })
        .register_fn("symbol", |name: &str| {
            Condition::place(Place::Symbol(name.into()))
        })
        .register_fn("line", |file: &str, line: i64| {
            Condition::place(Place::Line(file.into(), line as u32))
        })
        .register_fn("instructions", |cpu: i64, count: i64| {
            let count = count.clamp(1, u32::MAX.into());
            Condition::instructions(cpu as u32, count as u32)
        })
        .register_fn("physical_write", |address: i64, size: i64| {
            Condition::physical_write(address as u64, size as u64)
        })
        .register_fn("write", |space: i64, address: i64, size: i64| {
            Condition::write(space as u64, address as u64, size as u64)
        })
        .register_fn(
            "in_call",
            |condition: Condition, name: &str| -> Fallible<Condition> {
                Ok(condition.call(entry(name)?))
            },
        )
        .register_fn("thread", |condition: Condition, number: i64| {
            condition.thread(Who::Number(number as u64))
        })
        .register_fn("hash", |condition: Condition, hash: i64| {
            condition.thread(Who::Hash(hash as u64))
        })
        .register_fn("space", |condition: Condition, number: i64| {
            condition.space(number as u64)
        })
        .register_fn("count", |condition: Condition, n: i64| {
            condition.count(n as u64)
        })
        .register_fn("to_string", |condition: &mut Condition| {
            condition.to_string()
        });
}
