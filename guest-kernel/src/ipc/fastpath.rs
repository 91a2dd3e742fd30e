//! The fast path of idempotent messages: of a call to a server that waits for one, and of a reply after which
//! the server waits again. Both hand the CPU straight to the other thread, as Fluke's `ipc_call` did
//! (`thread_handoff`, fluke-api 9.5).
//!
//! All is looked at before anything is changed. Whatever is not as it most often is, from a message of several
//! pieces to a fault, is left to the [`engine`], which starts from the same registers; and what is changed here
//! is what it would change, so that nobody can tell afterwards which way a message went.

use fluke_abi::code::Status;
use fluke_abi::entry::Entry;
use fluke_abi::ipc::Flavour;
use fluke_abi::object::OBJECT_SIZE;
use fluke_abi::state::Prot;

use super::{Port, Pset, engine, transfer};
use crate::arena::Id;
use crate::boundary::hand_over;
use crate::call::{Call, Done};
use crate::kernel::Kernel;
use crate::mm::access::{View, mapped};
use crate::mutant::mutant;
use crate::object::{Link, Object};
use crate::reference::Ref;
use crate::sched::Entity;
use crate::thread::{Run, Side, Thread, Wait};

/// Commit point: the server has the message.
pub fn ipc_call(call: &mut Call) -> Done {
    let id = call.id;
    match call.kernel().call_waiting(id) {
        Some(next) => hand_over(call, next),
        None => engine::run(call),
    }
}

/// Commit point: the client has the reply.
pub fn ipc_reply_wait_receive(call: &mut Call) -> Done {
    let id = call.id;
    match call.kernel().reply_and_wait(id) {
        Some(next) => hand_over(call, next),
        None => engine::run(call),
    }
}

impl Kernel {
    /// Gives the caller's message to the first server thread that waits for messages of its port, and lets the
    /// caller wait for the reply. That server, which is now to run.
    #[inline]
    fn call_waiting(&mut self, client: Id<Thread>) -> Option<Next> {
        let thread = &self.threads[client];
        let view = self.view_of(thread);
        let reference = self.find::<Ref>(view, thread.frame.rdi)?;
        let Link::Port(port) = self.refs[reference].link else {
            return None;
        };
        let &Port { alias, pset, .. } = self.ports.get(port)?;
        let pset = pset?;
        let (_, waiting) = self.psets[pset].servers.front(&self.threads)?;
        if waiting.scheduler.is_some() {
            return None;
        }
        let words = self.copy_at_once(thread, view, waiting)?;
        let (server, thread) = self.psets[pset].servers.pop(&mut self.threads)?;
        thread.frame.rax = thread.word().with_flavour(Flavour::Idempotent as u8).0;
        thread.frame.r15 = alias;
        thread.idempotent_client = Some(client);
        let next = complete(thread, words);
        self.sleep(client, Wait::Reply(server));
        Some(next)
    }

    /// Gives the caller's reply to the client whose call it serves, and lets the caller wait for the next message.
    /// That client, which is now to run.
    #[inline]
    fn reply_and_wait(&mut self, server: Id<Thread>) -> Option<Next> {
        let thread = &self.threads[server];
        let client = thread.idempotent_client?;
        let waiting = self.threads.get(client)?;
        let plain = waiting.run == Run::Waiting(Wait::Reply(server))
            && waiting.exception.is_none()
            && waiting.scheduler.is_none()
            && thread.connection(Side::Server).is_none();
        if !plain {
            return None;
        }
        let view = self.view_of(thread);
        let pset = self.find::<Pset>(view, thread.server_pset)?;
        if self.first_client(pset).is_some() {
            return None;
        }
        let words = self.copy_at_once(thread, view, waiting)?;
        let next = complete(&mut self.threads[client], words);
        let thread = &mut self.threads[server];
        thread.become_entry(Entry::ipc_wait_receive);
        thread.idempotent_client = None;
        thread.notified = None;
        self.sleep(server, Wait::Pset(pset));
        Some(next)
    }

    /// The object of type `T` at an address in a page that is mapped.
    #[inline(always)]
    fn find<T: Object>(&self, view: View, handle: u64) -> Option<Id<T>> {
        if !handle.is_multiple_of(OBJECT_SIZE) {
            return None;
        }
        self.find_object(mapped(view, handle, Prot::READ)?)
    }
}

/// Who is to run next: for the scheduler, and at which priority.
type Next = (Id<Entity>, u8);

/// A thread that waits has so many words, and its transfer is done. It is to run, which it will by [`hand_over`].
#[inline(always)]
fn complete(thread: &mut Thread, words: u64) -> Next {
    if !mutant!(words_kept) {
        transfer::received(&mut thread.frame, words);
    }
    thread.complete_transfer(Status::Success);
    thread.run = Run::Scheduled;
    (thread.entity, thread.priority)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::memory::{read_word, write_word};
    use crate::kernel::tests::kernel;
    use crate::lock::{self, scheduler};
    use crate::mm::{Mapping, Source};
    use proptest::prelude::*;
    use std::vec::Vec;

    /// Where memory is, virtual and physical: the objects, what each thread sends, and its room.
    const BASE: u64 = 0x1000_0000;
    const MEMORY: u64 = 0x10_0000;
    const PAGES: u64 = 8;
    const PAGE: u64 = fluke_abi::layout::PAGE_SIZE;
    const MEMORY_WORDS: u64 = (PAGES + 1) * 2 * PAGE / 8;
    /// The first page in memory.
    const FIRST: u64 = MEMORY + PAGES * 2 * PAGE;
    /// Where the reference to the port is in it; before it is the port set.
    const REFERENCE: u64 = 32;
    /// A value that no call gives.
    const OTHER: u64 = 0x5a5a;

    /// A message of a call: words, from which byte of a page on, and the same of who gets it.
    #[derive(Clone, Copy, Debug)]
    struct Message {
        words: u64,
        from: u64,
        room: u64,
        to: u64,
        table: bool,
        /// Where the reference to the port is, if it is there.
        port: u64,
    }

    fn message() -> impl Strategy<Value = Message> {
        let near_the_end = prop_oneof![0..PAGE, PAGE - 64..PAGE];
        let aligned = (near_the_end.clone(), near_the_end, 0u8..8);
        let rare = 0u8..8;
        let rest = (
            0u64..10,
            0u64..10,
            rare,
            prop_oneof![6 => Just(REFERENCE), 1 => REFERENCE..REFERENCE + 16, 1 => 0u64..96],
        );
        (aligned, rest).prop_map(|((from, to, odd), (words, room, table, port))| {
            let align = |address: u64| if odd == 0 { address } else { address & !7 };
            Message {
                words,
                from: align(from),
                room,
                to: align(to),
                table: table == 0,
                port,
            }
        })
    }

    /// Two threads, and what they need for calls.
    struct World {
        client: Id<Thread>,
        server: Id<Thread>,
    }

    impl World {
        /// Pages that have been touched, a bit each; and whether the port is the scheduler of client and server.
        fn new(touched: u8, asks: [bool; 2]) -> Self {
            let mut kernel = kernel();
            let space = kernel.create_space(None).unwrap();
            // Pages that are neighbours have none in memory.
            for page in 0..PAGES {
                let mut mapping = Mapping::new(0);
                (mapping.start, mapping.size) = (BASE + page * PAGE, PAGE);
                let physical = MEMORY + (PAGES - page) * 2 * PAGE;
                (mapping.prot, mapping.source) = (Prot::all(), Source::Physical(physical));
                let mapping = kernel.mappings.insert(mapping).ok().unwrap();
                kernel.aim_mapping(mapping, space);
            }
            let pset = kernel.psets.insert(Pset::new(1)).ok().unwrap();
            let port = kernel.ports.insert(Port::new(2)).ok().unwrap();
            kernel.ports[port].alias = 77;
            kernel.set_pset(port, Some(pset));
            let reference = kernel.refs.insert(Ref::new(3)).ok().unwrap();
            kernel.refs[reference].link = Link::Port(port);
            kernel.attach(pset, FIRST);
            kernel.attach(reference, FIRST + REFERENCE);
            let [client, server] = asks.map(|asks| {
                let id = kernel.create_thread(None).unwrap();
                let thread = &mut kernel.threads[id];
                thread.space = Some(space);
                thread.server_pset = BASE;
                thread.scheduler = asks.then_some(port);
                id
            });
            for page in (0..PAGES).filter(|page| touched & 1 << page != 0) {
                let touched = kernel.fault_in(client, BASE + page * PAGE, Prot::WRITE);
                assert!(touched.is_ok());
            }
            for n in 0..MEMORY_WORDS {
                write_word(MEMORY + n * 8, n);
            }
            lock::tests::install(kernel);
            Self { client, server }
        }

        /// A thread makes a call: its message and its room are in pages of its own.
        fn call(&self, id: Id<Thread>, entry: Entry, sends: Message, gets: Message, fast: bool) {
            let kernel = lock::held_kernel();
            let thread = &mut kernel.threads[id];
            let base = BASE + PAGE + u64::from(id == self.server) * 3 * PAGE;
            let frame = &mut thread.frame;
            frame.rax = entry as u64 | u64::from(sends.table) << 16;
            (frame.rdi, frame.r15) = (BASE + sends.port, OTHER);
            (frame.rsi, frame.rdx) = (base + sends.from, sends.words);
            (frame.r10, frame.r8) = (base + PAGE + gets.to, gets.room);
            // A table of one buffer without words.
            (frame.r9, frame.r13) = (BASE + 0x800, BASE + 0x800);
            (thread.in_call, thread.run) = (true, Run::Scheduled);
            let entity = thread.entity;
            scheduler().run_now(entity);
            let next = if !fast {
                None
            } else if entry == Entry::ipc_call {
                kernel.call_waiting(id)
            } else {
                kernel.reply_and_wait(id)
            };
            match next {
                Some((next, priority)) => scheduler().make_ready(next, priority),
                None => drop(engine::run(&mut Call::new(&scheduler(), entity))),
            }
            scheduler().block(entity);
        }

        fn runs(&self, id: Id<Thread>) -> bool {
            lock::held_kernel().threads[id].run == Run::Scheduled
        }

        /// All that a user, or another call, can see.
        fn seen(&self) -> Vec<u64> {
            let kernel = lock::held_kernel();
            let mut seen = Vec::new();
            for id in [self.client, self.server] {
                let thread = &kernel.threads[id];
                let frame = &thread.frame;
                seen.extend([
                    frame.rax, frame.rip, frame.rdi, frame.rsi, frame.rdx, frame.r10,
                ]);
                seen.extend([
                    frame.r8, frame.r9, frame.r12, frame.r13, frame.r14, frame.r15,
                ]);
                seen.push(u64::from(thread.in_call));
                seen.push(match thread.run {
                    Run::Scheduled => 0,
                    Run::Stopped => 1,
                    Run::Waiting(Wait::Pset(_)) => 2,
                    Run::Waiting(Wait::Reply(of)) => 3 + u64::from(of == self.server),
                    Run::Waiting(Wait::Port(_)) => 5,
                    Run::Waiting(_) => 6,
                });
                seen.push(u64::from(thread.idempotent_client == Some(self.client)));
                seen.push(u64::from(thread.notified.is_some()));
            }
            let psets = kernel.psets.ids().map(|id| &kernel.psets[id].servers);
            seen.extend(psets.map(|servers| u64::from(servers.is_empty())));
            seen.push(kernel.fault.address);
            seen.extend((0..MEMORY_WORDS).map(|n| read_word(MEMORY + n * 8)));
            seen
        }
    }

    proptest! {
        /// Nobody can tell which way a message went.
        #[test]
        fn the_fast_path_does_what_the_engine_does(
            touched: u8,
            asks in [0u8..8, 0u8..8],
            waits: bool,
            request in message(),
            reply in message(),
        ) {
            let play = |fast| {
                let world = World::new(touched, asks.map(|asks| asks == 0));
                let idle = Message { words: 0, ..request };
                if waits {
                    world.call(world.server, Entry::ipc_wait_receive, idle, request, false);
                }
                world.call(world.client, Entry::ipc_call, request, reply, fast);
                let called = world.seen();
                if !waits || !world.runs(world.server) {
                    return (called, Vec::new());
                }
                world.call(world.server, Entry::ipc_reply_wait_receive, reply, request, fast);
                (called, world.seen())
            };
            let (fast, long) = (play(true), play(false));
            prop_assert!(fast.0 == long.0, "the call");
            prop_assert!(fast.1 == long.1, "the reply");
        }
    }

    /// Else the test above would not see anything.
    #[test]
    fn a_short_message_takes_the_fast_path() {
        let world = World::new(!0, [false; 2]);
        let message = Message {
            words: 2,
            from: 0,
            room: 2,
            to: 0,
            table: false,
            port: REFERENCE,
        };
        let (client, server) = (world.client, world.server);
        world.call(server, Entry::ipc_wait_receive, message, message, false);
        world.call(client, Entry::ipc_call, message, message, true);
        let kernel = lock::held_kernel();
        assert!(kernel.threads[client].wait() == Some(Wait::Reply(server)));
        assert!(world.runs(server));
        kernel.threads[server].run = Run::Waiting(Wait::Forever);
        let pset = kernel.psets.ids().next();
        assert!(pset.is_some_and(|pset| kernel.psets[pset].servers.is_empty()));
        assert!(kernel.call_waiting(client).is_none(), "nobody waits");
        kernel.threads[server].frame.rdx = 0;
        assert!(kernel.reply_and_wait(server).is_some());
        let view = kernel.view(client);
        let there =
            [0, 1, 8, 9].map(|by| kernel.find::<Ref>(view, BASE + REFERENCE + by).is_some());
        assert_eq!(there, [true, false, false, false]);
    }
}
