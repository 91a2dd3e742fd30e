//! A thread stopped in the middle of a long message.

use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use core::sync::atomic::{
    AtomicU64, AtomicUsize,
    Ordering::{Acquire, Relaxed, Release},
};

use fluke_abi::code::Status;
use fluke_abi::entry::Entry;
use fluke_abi::ipc::{Buffer, CallWord, Flavour, Params, WORD_SIZE};
use fluke_abi::layout::GATE;
use fluke_abi::object::Type;
use fluke_abi::state::{ThreadFlags, ThreadState};
use libfluke::object::{Cond, Mutex, Port, Pset, Ref, Thread, ThreadLinks};
use libfluke::rpc::Server;
use libfluke::{println, sys, thread};

use super::{Checks, Trouble};

/// The figures of the example in OSDI '99, section 4.3: of 8,192 bytes, 6,144 have gone.
const WORDS: usize = 8192 / WORD_SIZE as usize;
const FIRST: usize = 6144 / WORD_SIZE as usize;

/// How far the two threads are.
const STARTED: u64 = 0;
const FIRST_RECEIVED: u64 = 1;
const GO_ON: u64 = 2;
const RECEIVED: u64 = 3;

struct Scene {
    mutex: Mutex,
    cond: Cond,
    stage: AtomicU64,
    sent: AtomicU64,
    receipt: AtomicUsize,
    /// Statuses of the two receives, and what arrived.
    statuses: [AtomicU64; 2],
    arrived: [AtomicU64; WORDS],
}

impl Scene {
    fn reach(&self, stage: u64) {
        self.mutex.lock();
        self.stage.store(stage, Release);
        self.cond.broadcast();
        self.mutex.unlock();
    }

    fn wait_for(&self, stage: u64) {
        self.mutex.lock();
        while self.stage.load(Acquire) < stage {
            self.cond.wait(&self.mutex);
        }
        self.mutex.unlock();
    }

    fn keep(&self, words: &[u64]) {
        let from = self.receipt.fetch_add(words.len(), Relaxed);
        for (slot, word) in self.arrived.iter().skip(from).zip(words) {
            slot.store(*word, Relaxed);
        }
    }
}

fn receive(scene: &Scene, pset: &Pset) {
    let mut buffer = vec![0; FIRST];
    let mut server = Server::new(pset, &mut buffer, &[]);
    let request = server.wait();
    if request.flavour == Flavour::Reliable {
        scene.keep(server.words());
    }
    scene.statuses[0].store(request.status as u64, Relaxed);
    scene.reach(FIRST_RECEIVED);
    scene.wait_for(GO_ON);
    let request = server.more();
    scene.keep(server.words());
    scene.statuses[1].store(request.status as u64, Relaxed);
    scene.reach(RECEIVED);
}

fn send(scene: &Scene, port: &Ref, message: &[u64]) {
    let send = Buffer {
        address: message.as_ptr() as u64,
        words: message.len() as u64,
    };
    let mut params = Params {
        send,
        ..Params::default()
    };
    // SAFETY: the message outlives the thread.
    unsafe {
        let status = sys::ipc_client_connect_send(port.handle(), &raw mut params);
        scene.sent.store(status, Relaxed);
        // The end of the message, and of the connection.
        sys::ipc_client_disconnect();
    }
}

pub fn tour(checks: &mut Checks) -> Result<(), Trouble> {
    let scene = Arc::new(Scene {
        mutex: Mutex::new(),
        cond: Cond::new(),
        stage: AtomicU64::new(STARTED),
        sent: AtomicU64::new(u64::MAX),
        receipt: AtomicUsize::new(0),
        statuses: [const { AtomicU64::new(u64::MAX) }; 2],
        arrived: [const { AtomicU64::new(0) }; WORDS],
    });
    scene.mutex.create()?;
    scene.cond.create()?;
    let pset = Pset::alloc()?;
    let port = Ref::to(Port::in_set(pset, 0)?)?;
    let message: &'static [u64] = (0..WORDS as u64)
        .map(|i| i.wrapping_mul(0x9e37_79b9))
        .collect::<Vec<_>>()
        .leak();
    let (s, r) = (scene.clone(), scene.clone());
    let receiver = thread::spawn(move || receive(&r, pset))?;
    let mut sender = thread::spawn(move || send(&s, port, message))?;
    scene.wait_for(FIRST_RECEIVED);
    checks.equal(
        format_args!("(words received, status) when the receiver's buffer is full"),
        &(FIRST, Status::RecvMoreData as u64),
        &(scene.receipt.load(Relaxed), scene.statuses[0].load(Relaxed)),
    );

    let links = ThreadLinks::alloc()?;
    let mut state = sender.thread().state(Some(links));
    let stopped = |state: &ThreadState| {
        ThreadFlags::from_bits_retain(state.flags).contains(ThreadFlags::STOPPED)
    };
    checks.equal(
        format_args!(
            "(it had been stopped before its state was taken; before that was done again)"
        ),
        &(false, true),
        &(stopped(&state), stopped(&sender.thread().state(None))),
    );
    let registers = &state.registers;
    println!(
        "  sender: rax {:#x}, rsi {:#x}, rdx {:#x}, rip {:#x}",
        registers.rax, registers.rsi, registers.rdx, registers.rip
    );
    checks.equal(
        format_args!("the call that the stopped sender is about to make"),
        &Some(Entry::ipc_client_send),
        &Entry::from_number(CallWord(registers.rax).number()),
    );
    let left = (WORDS - FIRST) as u64;
    let next = message.as_ptr() as u64 + FIRST as u64 * WORD_SIZE;
    checks.equal(
        format_args!("(rip, words left, from address)"),
        &(GATE, left, next),
        &(registers.rip, registers.rdx, registers.rsi),
    );
    let to_receiver = Ref::to(receiver.thread())?;
    checks.equal(
        format_args!("(it is sender, its server is the receiver)"),
        &(true, Type::Thread, true),
        &(
            ThreadFlags::from_bits_retain(state.flags).contains(ThreadFlags::CLIENT_SENDER),
            links.server.kind(),
            links.server.same(to_receiver),
        ),
    );

    sender.thread().destroy();
    let heir = Thread::alloc()?;
    state.thread_va = heir.handle() as u64;
    state.flags &= !ThreadFlags::STOPPED.bits();
    // SAFETY: the state is that of a thread of this program, which no longer exists; its stack is
    // as it left it.
    unsafe { heir.set_state(Some(&state), Some(&links.task), None, Some(&links.server)) };
    sender.replace(heir);
    scene.reach(GO_ON);
    scene.wait_for(RECEIVED);
    sender.join();
    receiver.join();
    checks.equal(
        format_args!("(words received, status) after the connection's end"),
        &(WORDS, Status::RecvDisconnected as u64),
        &(scene.receipt.load(Relaxed), scene.statuses[1].load(Relaxed)),
    );
    checks.equal(
        format_args!("status that the new sender saw"),
        &(Status::Success as u64),
        &scene.sent.load(Relaxed),
    );
    let same = scene
        .arrived
        .iter()
        .zip(message)
        .filter(|(a, m)| a.load(Relaxed) == **m)
        .count();
    checks.equal(format_args!("words equal to those sent"), &WORDS, &same);
    Ok(())
}
