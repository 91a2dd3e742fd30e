//! Plays a scene: a thread, the *target*, makes calls, and a *partner* does what they need. Whenever the
//! host rings, the auditor, which is more important than both, takes the target apart: it extracts its
//! state by ordinary calls, destroys it, makes it again from the state, and lets it go on. What comes of
//! the scene must be the same as without.
//!
//! `flukevm verify` does this at every instruction of the kernel's on behalf of one of the target's calls, which
//! is marked by [`MARK`]. By itself the program lists its scenes, or plays one.

mod scenes;
mod short;

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering::AcqRel};

use fluke_abi::audit::{ELSEWHERE, MARK, News, Outcome, RESULTS_MAX, TARGET_HASH, Told};
use fluke_abi::code::Status;
use fluke_abi::state::{MutexState, PRIORITY_DEFAULT, PRIORITY_MAX, ThreadFlags, ThreadState};
use libfluke::object::{Mutex, Ref, Target as _, Thread, ThreadLinks};
use libfluke::startup::{self, startup};
use libfluke::{heap, parent, println, sys, thread};

use crate::handler;
use scenes::{After, Scene, Script};

/// Bytes of a player's stack.
const STACK_BYTES: u64 = 16 << 10;

/// What the host is told. Written by whoever has something to tell, one at a time.
struct Shared(core::cell::UnsafeCell<Told>);

// SAFETY: the players write to results of their own, the auditor to the state, and who tells to the rest.
unsafe impl Sync for Shared {}

const NOTHING: Told = Told {
    news: 0,
    outcome: Outcome {
        target: [0; RESULTS_MAX],
        partner: [0; RESULTS_MAX],
        target_left: [0; RESULTS_MAX],
        partner_left: [0; RESULTS_MAX],
        memory: 0,
    },
    state: NO_STATE,
};

/// What the last of the players tells.
static PLAYED: Shared = Shared(core::cell::UnsafeCell::new(NOTHING));
/// What the auditor tells, perhaps on another CPU at the same time.
static AUDITED: Shared = Shared(core::cell::UnsafeCell::new(NOTHING));

/// Zeros.
const NO_STATE: ThreadState = {
    // SAFETY: the state is made of numbers.
    unsafe { core::mem::zeroed() }
};

fn tell(told: &Shared, news: News) {
    let told = told.0.get();
    // SAFETY: nobody else tells this.
    unsafe {
        (*told).news = news as u64;
        sys::machine_tell(told as u64);
    }
}

/// Players that have something to do yet.
static BUSY: AtomicU64 = AtomicU64::new(0);

/// A thread that plays a script.
struct Player {
    script: &'static Script,
    results: *mut [u64; RESULTS_MAX],
    left: *mut [u64; RESULTS_MAX],
    filled: &'static [(u64, u64)],
}

/// First function of a player.
unsafe extern "C" fn play(player: *const Player) -> ! {
    // SAFETY: the player is leaked.
    let player = unsafe { &*player };
    let Script {
        calls,
        marked,
        after,
    } = player.script;
    handler::install();
    let mut next = 0;
    loop {
        while let Some(&(word, mut registers)) = calls.get(next) {
            // Not a constant, which the compiler could come to have in `rbp` elsewhere.
            let mark = core::hint::black_box(if *marked == Some(next) { MARK } else { 0 });
            // SAFETY: whatever the registers point to is leaked, and the handlers are installed.
            let result = unsafe {
                match word.0 {
                    scenes::PEEK => handler::peek(registers[0]),
                    word => handler::call_marked(word, &mut registers, mark),
                }
            };
            if *after == After::Done {
                // SAFETY: this player's alone; `Scene` has no longer scripts.
                unsafe {
                    (*player.results)[next] = result;
                    (*player.left)[next] = digest(&[left(&registers)]);
                }
            }
            next += 1;
        }
        match *after {
            After::Again(from) => next = from,
            After::Done => break,
        }
    }
    if BUSY.fetch_sub(1, AcqRel) == 1 {
        // SAFETY: everybody else is done.
        unsafe { (*PLAYED.0.get()).outcome.memory = digest(player.filled) };
        tell(&PLAYED, News::Done);
    }
    thread::sleep_forever()
}

/// Where parameters are, but for the first: address and bytes.
fn left(registers: &[u64; 9]) -> (u64, u64) {
    let left = &registers[1..];
    (left.as_ptr() as u64, size_of_val(left) as u64)
}

/// FNV-1a of ranges of memory: address and bytes.
fn digest(ranges: &[(u64, u64)]) -> u64 {
    let bytes = ranges.iter().flat_map(|&(address, size)| {
        // SAFETY: the scene's memory, which is there for good.
        unsafe { core::slice::from_raw_parts(address as *const u8, size as usize) }
    });
    bytes.fold(0xcbf2_9ce4_8422_2325, |digest, &byte| {
        (digest ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    })
}

/// Makes a stopped player; its state, with which it will run.
fn make(thread: &Thread, player: Player, priority: u64) -> Result<ThreadState, Status> {
    let stack = heap::pages(STACK_BYTES).ok_or(Status::NoMemory)?;
    // The first fault on it is not part of any call.
    // SAFETY: the memory was just allocated.
    unsafe { (stack as *mut u8).write_bytes(0, STACK_BYTES as usize) };
    let mut state = ThreadState {
        thread_va: thread.handle() as u64,
        priority,
        flags: ThreadFlags::STOPPED.bits(),
        ..ThreadState::default()
    };
    state.registers.rip = play as *const () as u64;
    // As after a call.
    state.registers.rsp = stack + STACK_BYTES - 8;
    state.registers.rdi = Box::leak(Box::new(player)) as *const Player as u64;
    state.registers.rflags = 0x202;
    // SAFETY: the stack is its own, and the function is given what it wants.
    unsafe { thread.set_state(Some(&state), Some(&startup().space), None, None) };
    state.flags = 0;
    Ok(state)
}

/// Takes the target apart and puts it together again.
struct Auditor {
    target: &'static Thread,
    to_target: &'static Ref,
    links: &'static ThreadLinks,
    owner: &'static Ref,
    mutexes: &'static [&'static Mutex],
    /// Whether the target is put together in another machine: the program goes there in between.
    elsewhere: bool,
}

impl Auditor {
    fn new(
        target: &'static Thread,
        mutexes: &'static [&'static Mutex],
        elsewhere: bool,
    ) -> Result<Self, Status> {
        let owner = Ref::alloc()?;
        Ok(Self {
            target,
            to_target: Ref::to(target)?,
            links: ThreadLinks::alloc()?,
            owner,
            mutexes,
            elsewhere,
        })
    }

    /// The host has rung for that time.
    fn audit(&self, rung: u64) {
        let mut state = self.target.state(Some(self.links));
        // SAFETY: only the auditor writes it.
        unsafe { (*AUDITED.0.get()).state = state };
        tell(&AUDITED, News::Taken);
        if self.elsewhere {
            parent::checkpoint(rung);
        }
        let owned: Vec<_> = self
            .mutexes
            .iter()
            .filter_map(|mutex| self.owned(mutex).map(|state| (mutex, state)))
            .collect();
        self.target.destroy();
        let mut hash = TARGET_HASH;
        // SAFETY: memory that held an object, and a local.
        unsafe { sys::thread_create_hash(self.target.handle(), &raw mut hash) };
        self.target.point(self.to_target);
        for (mutex, state) in owned {
            // SAFETY: objects, and a state to be read.
            unsafe {
                sys::mutex_set_state(mutex.handle(), &raw const state, self.to_target.handle())
            };
        }
        let ThreadLinks {
            task,
            client,
            server,
            ..
        } = self.links;
        state.flags &= !ThreadFlags::STOPPED.bits();
        // SAFETY: the state is the thread's own.
        unsafe {
            sys::thread_set_state(
                self.target.handle(),
                &raw const state,
                task.handle(),
                self.links.scheduler.handle(),
                core::ptr::null_mut(),
                client.handle(),
                server.handle(),
            )
        };
    }

    /// State of a mutex that the target owns.
    fn owned(&self, mutex: &Mutex) -> Option<MutexState> {
        let mut state = MutexState::default();
        // SAFETY: objects, and a state to be written.
        unsafe {
            sys::mutex_get_state(mutex.handle(), &raw mut state, self.owner.handle());
        }
        (state.locked != 0 && self.owner.same(self.to_target)).then_some(state)
    }
}

/// Plays a scene, and waits for the host.
fn run(name: &str, elsewhere: bool) -> Result<(), Status> {
    let [target, partner] = [Thread::alloc()?, Thread::alloc()?];
    target.destroy();
    let mut hash = TARGET_HASH;
    // SAFETY: memory for an object, and a local.
    unsafe { sys::thread_create_hash(target.handle(), &raw mut hash) };
    let Some(scene) = scenes::find(name, target, partner)? else {
        println!("audit: there is no scene `{name}`");
        tell(&AUDITED, News::Failed);
        return Ok(());
    };
    let Scene {
        target: of_target,
        partner: of_partner,
        partner_first,
        mutexes,
        filled,
    } = Box::leak(Box::new(scene));
    let scripts = [&*of_target, &*of_partner];
    let busy = scripts.iter().filter(|script| script.after == After::Done);
    BUSY.store(busy.count() as u64, core::sync::atomic::Ordering::Release);
    let outcome = PLAYED.0.get();
    // SAFETY: places for the results, one for each player.
    let results = unsafe {
        let outcome = &raw mut (*outcome).outcome;
        [
            (&raw mut (*outcome).target, &raw mut (*outcome).target_left),
            (
                &raw mut (*outcome).partner,
                &raw mut (*outcome).partner_left,
            ),
        ]
    };
    let priority = PRIORITY_DEFAULT + 2;
    let priorities = [
        priority,
        if *partner_first {
            priority + 1
        } else {
            priority - 1
        },
    ];
    let mut states = Vec::new();
    for (n, thread) in [target, partner].into_iter().enumerate() {
        let player = Player {
            script: scripts[n],
            results: results[n].0,
            left: results[n].1,
            filled,
        };
        states.push((thread, make(thread, player, priorities[n])?));
    }
    let auditor = Auditor::new(target, mutexes, elsewhere)?;
    tell(&AUDITED, News::Ready);
    for (thread, state) in &states {
        // SAFETY: the states are the threads' own.
        unsafe { thread.set_state(Some(state), None, None, None) };
    }
    let mut heard = 0;
    loop {
        // SAFETY: the call has no pointers.
        let rung = unsafe { sys::machine_listen(heard) };
        // In another machine it has not rung.
        if rung > heard {
            auditor.audit(rung);
        }
        heard = rung;
    }
}

/// The program.
pub fn main() -> u64 {
    let mut args = startup::args().skip(1);
    let Some(name) = args.next() else {
        scenes::names().for_each(|name| println!("{name}"));
        return 0;
    };
    let elsewhere = args.next() == Some(ELSEWHERE);
    let auditor = thread::spawn(move || {
        if let Err(status) = run(name, elsewhere) {
            println!("audit: cannot set the scene: {}", status.name());
            tell(&AUDITED, News::Failed);
        }
    });
    let Ok(auditor) = auditor else {
        println!("audit: no memory for a thread");
        return crate::FAILED;
    };
    auditor.set_priority(PRIORITY_MAX);
    auditor.join();
    crate::FAILED
}
