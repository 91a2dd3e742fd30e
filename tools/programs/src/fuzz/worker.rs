//! A thread that makes random calls, and what is done with it when it sleeps in one.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use fluke_abi::code::Status;
use fluke_abi::entry::{Convention, Entry, Row, TABLE};
use fluke_abi::error::pointee;
use fluke_abi::ipc::CallWord;
use fluke_abi::layout::{GATE, GATE_DONE};
use fluke_abi::object::Type;
use fluke_abi::state::{PRIORITY_DEFAULT, ThreadFlags};
use libfluke::thread::{self, Handle};
use libfluke::{startup, sys};

use super::arena::Arena;
use super::random::Random;
use crate::handler;

/// Most words of a buffer.
const WORDS_MAX: u64 = 1024;
/// Looks after which a worker that has not made a call is taken to sleep.
const STRIKES: u64 = 3;

/// What a worker shares with whoever looks after it.
#[derive(Default)]
pub struct Progress {
    /// Calls made.
    pub calls: AtomicU64,
    /// No more calls are made.
    pub finished: AtomicBool,
}

/// A thread that makes random calls.
pub struct Worker {
    handle: Handle,
    progress: &'static Progress,
    /// Calls it had made at the last look.
    seen: u64,
    /// Looks since then.
    strikes: u64,
}

/// What has been done to workers that slept.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rescues {
    /// The call was abandoned.
    pub abandoned: u64,
    /// The thread was interrupted.
    pub interrupted: u64,
    /// The thread was destroyed, and made again from its state.
    pub replaced: u64,
}

/// Registers of a call: those of a message transfer are the most that any has.
#[derive(Default)]
struct Registers {
    rax: u64,
    /// `rdi rsi rdx r10 r8 r9 r12 r13 r14`.
    rest: [u64; 9],
}

/// The type of object that a parameter of type `ty` points to.
fn object_type(ty: &str) -> Option<Type> {
    let name = pointee(ty)?;
    Type::ALL.into_iter().find(|kind| kind.name() == name)
}

/// A random parameter.
fn parameter(row: &Row, name: &str, ty: &str, arena: &Arena, random: &mut Random) -> u64 {
    use Entry::*;
    match Entry::from_number(row.number) {
        // The caller must find its way back, because an exception that it does not handle itself ends
        // the program. And nobody wants to read it all.
        Some(thread_disable_exceptions | thread_set_handlers) if name == "cur_thread" => 0x1000,
        Some(thread_set_saved_state | thread_return_from_exception) => 0x1000,
        Some(thread_sleep) => random.one_of(&[0, 1, u64::MAX]),
        _ if name == "cur_thread" => random.one_of(&[0, 0, 0, 0x1000]),
        _ if ty == "u64" => arena.number(random),
        _ => match object_type(ty) {
            Some(kind) => arena.handle(kind, random),
            None => arena.memory(random),
        },
    }
}

/// A random call.
fn call(arena: &Arena, random: &mut Random) -> Registers {
    let row = &TABLE[random.below(TABLE.len() as u64) as usize];
    let mut registers = Registers {
        rax: row.number.into(),
        rest: [0; 9],
    };
    match row.convention {
        Convention::Registers => {
            for (register, (name, ty)) in registers.rest.iter_mut().zip(row.parameters) {
                *register = parameter(row, name, ty, arena, random);
            }
        }
        Convention::Message => {
            let mut few = || {
                if random.once_in(4) {
                    random.below(3) as u8
                } else {
                    0
                }
            };
            registers.rax = CallWord(registers.rax)
                .with_send_buffers(few())
                .with_send_refs(few())
                .with_recv_buffers(few())
                .with_recv_refs(few())
                .0;
            let [dest, send, send_words, recv, recv_words, tables @ ..] = &mut registers.rest;
            let (name, ty) = row.parameters[0];
            *dest = parameter(row, name, ty, arena, random);
            for buffer in [send, recv].into_iter().chain(tables) {
                *buffer = arena.memory(random);
            }
            for words in [send_words, recv_words] {
                *words = random.below(WORDS_MAX);
            }
        }
    }
    if random.once_in(64) {
        registers.rax = random.next();
    }
    registers
}

impl Worker {
    /// A worker that makes `calls` calls.
    pub fn spawn(arena: &'static Arena, seed: u64, calls: u64) -> Result<Self, Status> {
        let progress: &'static Progress = alloc::boxed::Box::leak(Default::default());
        let handle = thread::spawn(move || {
            handler::install();
            let mut random = Random::new(seed);
            for _ in 0..calls {
                let Registers { rax, rest } = call(arena, &mut random);
                // SAFETY: all that the registers point to is the arena's.
                unsafe { handler::call(rax, rest) };
                progress.calls.fetch_add(1, Relaxed);
            }
            progress.finished.store(true, Relaxed);
        })?;
        Ok(Self {
            handle,
            progress,
            seen: 0,
            strikes: 0,
        })
    }

    /// Calls made.
    pub fn calls(&self) -> u64 {
        self.progress.calls.load(Relaxed)
    }

    /// Whether it makes no more calls.
    pub fn is_finished(&self) -> bool {
        self.progress.finished.load(Relaxed)
    }

    /// Unmakes a finished worker.
    pub fn join(self) {
        self.handle.join();
    }

    /// Looks whether the worker goes on, and makes it.
    pub fn look(&mut self, random: &mut Random, rescues: &mut Rescues) -> Result<(), Status> {
        let calls = self.calls();
        if self.is_finished() {
            return Ok(());
        }
        if calls != self.seen {
            (self.seen, self.strikes) = (calls, 0);
            return Ok(());
        }
        self.strikes += 1;
        if self.strikes < STRIKES {
            return Ok(());
        }
        let worker = self.handle.thread();
        if self.strikes == STRIKES && random.once_in(3) {
            // SAFETY: the object is the worker's.
            unsafe { sys::thread_interrupt(worker.handle()) };
            rescues.interrupted += 1;
            return Ok(());
        }
        let mut state = worker.state(None);
        if self.is_finished() {
            state.flags &= !ThreadFlags::STOPPED.bits();
            // SAFETY: the thread goes on as it was.
            unsafe { worker.set_state(Some(&state), None, None, None) };
            return Ok(());
        }
        if random.once_in(3) {
            worker.destroy();
            worker.create()?;
            rescues.replaced += 1;
        }
        let registers = &mut state.registers;
        // A call of a handler's is made, whatever it takes: with exceptions disabled it does not sleep.
        let flags = ThreadFlags::from_bits_truncate(state.flags);
        if registers.rip == GATE && flags.contains(ThreadFlags::EXCEPTION_ENABLE) {
            registers.rip = GATE_DONE;
            rescues.abandoned += 1;
        }
        state.flags &= !ThreadFlags::STOPPED.bits();
        state.priority = PRIORITY_DEFAULT;
        // SAFETY: the thread goes on where it was, or behind the call that it was in.
        unsafe { worker.set_state(Some(&state), Some(&startup::startup().space), None, None) };
        Ok(())
    }

    /// The call that the worker is in, for people.
    pub fn describe(&self) -> (u64, Option<&'static str>) {
        let registers = self.handle.thread().state(None).registers;
        let entry = Entry::from_number(CallWord(registers.rax).number());
        (registers.rip, entry.map(|entry| entry.row().name))
    }
}
