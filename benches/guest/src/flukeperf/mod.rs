//! The kernel's primitives, each many times: a workload of calls and context switches, and what each of them costs.
//!
//! Options: `count[=N]`, `batches=N`, `scale=N`, `only=PREFIX` ([`crate::meter`]), and `period=NS`, with which a more
//! important thread wakes in such intervals and notes how late it is (`watch`). With `threads=N` instead, so many
//! threads are put to sleep, for their memory to be looked at (`threads`); with `pairs=N`, so many clients and servers
//! work at once (`scaling`).

mod messages;
mod objects;
mod restart;
mod scaling;
mod states;
mod sync;
mod threads;
mod watch;

use libfluke::space::Error;
use libfluke::{println, startup};

use crate::meter::{Meter, Options};
use watch::Watch;

/// The program.
pub fn main() -> u64 {
    if startup::args().nth(1) == Some("server") {
        return messages::serve_as_neighbour();
    }
    let options = match Options::of_program() {
        Ok(options) => options,
        Err(word) => {
            println!(
                "flukeperf: `{word}`; options are count[=N], batches=N, scale=N, only=PREFIX, period=NS, threads=N, pairs=N"
            );
            return crate::USAGE;
        }
    };
    match run(options) {
        Ok(()) => 0,
        Err(error) => {
            println!("flukeperf: {error}");
            crate::FAILED
        }
    }
}

fn run(options: Options) -> Result<(), Error> {
    let mut meter = Meter::new(options);
    if options.threads > 0 {
        return Ok(threads::sleep(&meter, options.threads)?);
    }
    if options.pairs > 0 {
        scaling::all(&mut meter, options.pairs)?;
        meter.done();
        return Ok(());
    }
    let watch = match options.period {
        0 => None,
        period => Some(Watch::start(period)?),
    };
    // What telling the host costs, or looking at the counter.
    meter.measure("nothing", 1, || ());
    sync::all(&mut meter)?;
    messages::all(&mut meter)?;
    objects::all(&mut meter)?;
    states::all(&mut meter)?;
    restart::all(&mut meter)?;
    if let Some(watch) = watch {
        watch.stop();
    }
    meter.done();
    Ok(())
}
