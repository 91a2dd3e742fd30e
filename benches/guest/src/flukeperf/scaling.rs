//! The same work by several threads at once: how long it takes on as many CPUs as there are.

use alloc::vec::Vec;

use fluke_abi::code::Status;
use libfluke::object::{Port, Pset, Ref};
use libfluke::rpc::{self, Server};
use libfluke::thread;

use crate::meter::{Meter, cycles};

/// Requests of each pair, for each unit of scale.
const REQUESTS: u64 = 40;
/// Turns of each thread that only computes: some 30 ms.
const TURNS: u64 = 40_000_000;

/// Measures so many pairs of a client and a server, and so many threads that compute.
pub fn all(meter: &mut Meter, pairs: u64) -> Result<(), Status> {
    let requests = REQUESTS * meter.options().scale;
    let mut ports = Vec::new();
    for _ in 0..pairs {
        let pset = Pset::alloc()?;
        ports.push(Ref::to(Port::in_set(pset, 0)?)?);
        thread::spawn(move || {
            let mut buffer = [0; 2];
            let mut server = Server::new(pset, &mut buffer, &[]);
            loop {
                server.reply_and_wait(&[1]);
            }
        })?;
    }
    let (mut messages, mut computing) = (Vec::new(), Vec::new());
    for batch in 0..=meter.options().batches {
        let took = together(&ports, move |port| {
            for _ in 0..requests {
                let _ = rpc::rpc(port, &[1, 2], &[], &mut [0]);
            }
        })?;
        let computed = together(&ports, |_| {
            for turn in 0..TURNS {
                core::hint::black_box(turn);
            }
        })?;
        if batch > 0 {
            messages.push(took);
            computing.push(computed);
        }
    }
    meter.report("messages", pairs * requests, &messages);
    meter.report("computing", pairs, &computing);
    Ok(())
}

/// How long it takes until threads, one for each port, have done something.
fn together(
    ports: &[&'static Ref],
    what: impl Fn(&Ref) + Copy + Send + 'static,
) -> Result<u64, Status> {
    let start = cycles();
    let mut threads = Vec::new();
    for port in ports.iter().copied() {
        threads.push(thread::spawn(move || what(port))?);
    }
    threads.into_iter().for_each(thread::Handle::join);
    Ok(cycles() - start)
}
