//! A second space, which runs this same program as a server.

use alloc::vec;
use alloc::vec::Vec;

use fluke_abi::layout::PAGE_SIZE;
use libfluke::object::{Port, Pset, Ref};
use libfluke::parent::REGISTER;
use libfluke::rpc::{self, Server};
use libfluke::space::{Child, READ_WRITE, Spec};
use libfluke::startup;

use super::{Trouble, server};

/// `[ECHO, words...]`: the same words, each one more.
pub const ECHO: u64 = 0x10;
/// `[READ, pages]`: the sum of the first words of that many pages at [`VIEW`].
pub const READ: u64 = 0x11;
/// Most words in a request.
pub const WORDS_MAX: usize = 4096;
/// Where the demand-paged region appears, in the child and in its parent.
pub const VIEW: u64 = 0x31_0000_0000;

/// Starts the child.
pub fn start(server: server::Handle) -> Result<Child, Trouble> {
    let mut child = Child::new(&Spec::own_program(b"tour\0child\0", server.parent)?)?;
    let size = server::PAGES * PAGE_SIZE;
    child.map(
        server.demand,
        server::demand_start(),
        size,
        READ_WRITE,
        VIEW,
    )?;
    child.start();
    Ok(child)
}

/// What the child does.
pub fn main() -> u64 {
    // It never returns, unless something is wrong.
    match serve() {
        Ok(never) => match never {},
        Err(_) => crate::FAILED,
    }
}

fn serve() -> Result<core::convert::Infallible, fluke_abi::code::Status> {
    let pset = Pset::alloc()?;
    let port = Ref::to(Port::in_set(pset, 0)?)?;
    rpc::rpc(
        &startup::startup().parent,
        &[REGISTER, 0],
        &[port],
        &mut [0; 2],
    )?;
    let mut buffer = vec![0; WORDS_MAX + 1];
    let mut server = Server::new(pset, &mut buffer, &[]);
    let mut reply = Vec::new();
    loop {
        server.reply_and_wait(&reply);
        reply.clear();
        match *server.words() {
            [ECHO, ref words @ ..] => reply.extend(words.iter().map(|word| word + 1)),
            [READ, pages, ..] => reply.push(sum(pages)),
            _ => {}
        }
    }
}

/// The sum of the first words of the pages in view.
pub fn sum(pages: u64) -> u64 {
    (0..pages)
        // SAFETY: the parent has mapped that many pages there.
        .map(|page| unsafe { ((VIEW + page * PAGE_SIZE) as *const u64).read_volatile() })
        .sum()
}
