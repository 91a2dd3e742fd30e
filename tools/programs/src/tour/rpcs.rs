//! Reliable and idempotent requests to another space.

use alloc::vec::Vec;

use fluke_abi::object::Type;
use libfluke::rpc;
use libfluke::{object::Ref, startup};

use super::child::ECHO;
use super::{Checks, Trouble, server};

/// Words in the requests: the least, some, and enough to cross many pages.
const SIZES: [usize; 4] = [1, 64, 1024, 4096];
const CALLS: u64 = 20;

fn request(words: usize) -> Vec<u64> {
    core::iter::once(ECHO)
        .chain((0..words as u64).map(|i| i * i))
        .collect()
}

fn reliable(port: &Ref, words: usize) -> usize {
    let request = request(words);
    let mut reply = alloc::vec![0; words];
    let received = rpc::rpc(port, &request, &[], &mut reply).unwrap_or(0);
    let right = |(sent, got): (&u64, &u64)| *got == sent + 1;
    request[1..]
        .iter()
        .zip(&reply[..received])
        .filter(|&pair| right(pair))
        .count()
}

pub fn tour(checks: &mut Checks) -> Result<(), Trouble> {
    let port = server::child_port();
    checks.equal(
        format_args!("type of what the child's reference links to"),
        &Type::Port,
        &port.kind(),
    );
    for words in SIZES {
        let right = reliable(port, words);
        checks.equal(format_args!("words that came back right"), &words, &right);
    }
    let start = startup::now();
    let mut right = 0;
    for i in 0..CALLS {
        let mut reply = [0; 2];
        let called = rpc::call(port, &[ECHO, i, 7], &mut reply);
        right += u64::from(called == Ok(2) && reply == [i + 1, 8]);
    }
    let each = (startup::now() - start) / CALLS / 1000;
    checks.equal(
        format_args!("idempotent calls answered right ({each} us each)"),
        &CALLS,
        &right,
    );
    let nobody = Ref::alloc()?;
    checks.equal(
        format_args!("a call to nobody"),
        &Err(fluke_abi::code::Status::ConnectInvalidDest),
        &rpc::call(nobody, &[0, 0], &mut [0; 2]),
    );
    Ok(())
}
