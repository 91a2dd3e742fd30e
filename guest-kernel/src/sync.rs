//! Mutexes and condition variables (fluke-api 10).

use fluke_abi::object::Type;

use crate::arena::{Arena, Id};
use crate::kernel::Kernel;
use crate::mutant::mutant;
use crate::object::{Header, Object};
use crate::queue::Queue;
use crate::thread::Thread;

/// A mutex.
pub struct Mutex {
    header: Header<Self>,
    /// Attributes, without effect.
    pub flags: u64,
    /// Somebody holds it.
    pub locked: bool,
    /// Who; a holder that was destroyed leaves it locked.
    pub owner: Option<Id<Thread>>,
    /// Threads that wait in `mutex_lock`.
    pub waiters: Queue<Thread>,
}

impl Mutex {
    /// An unlocked mutex.
    pub const fn new(hash: u64) -> Self {
        Self {
            header: Header::new(hash),
            flags: 0,
            locked: false,
            owner: None,
            waiters: Queue::new(),
        }
    }
}

impl Object for Mutex {
    const TYPE: Type = Type::Mutex;

    fn header(&mut self) -> &mut Header<Self> {
        &mut self.header
    }

    fn arena(kernel: &mut Kernel) -> &mut Arena<Self> {
        &mut kernel.mutexes
    }
}

/// A condition variable.
pub struct Cond {
    header: Header<Self>,
    /// Attributes, without effect.
    pub flags: u64,
    /// Thread to which waiters' priority goes; kept, without effect.
    pub inheritor: Option<Id<Thread>>,
    /// Threads asleep in `cond_wait`: their registers name `mutex_lock`.
    pub waiters: Queue<Thread>,
}

impl Cond {
    /// A condition variable nobody waits for.
    pub const fn new(hash: u64) -> Self {
        Self {
            header: Header::new(hash),
            flags: 0,
            inheritor: None,
            waiters: Queue::new(),
        }
    }
}

impl Object for Cond {
    const TYPE: Type = Type::Cond;

    fn header(&mut self) -> &mut Header<Self> {
        &mut self.header
    }

    fn arena(kernel: &mut Kernel) -> &mut Arena<Self> {
        &mut kernel.conds
    }
}

impl Kernel {
    /// Lets go of a mutex: the first waiter gets it, and its `mutex_lock` is done. Handing the mutex
    /// over, instead of waking somebody to fight for it, leaves no wake-up that could get lost when
    /// the woken thread is stopped.
    pub fn unlock(&mut self, id: Id<Mutex>) {
        let next = self.mutexes[id].waiters.first(&self.threads);
        let mutex = &mut self.mutexes[id];
        mutex.locked = next.is_some();
        mutex.owner = next;
        if let Some(next) = next {
            if !mutant!(handover_on_stack) {
                self.threads[next].complete(0);
            }
            self.wake(next);
        }
    }

    /// Wakes the first thread asleep on a condition variable; says whether there was one.
    pub fn signal(&mut self, id: Id<Cond>) -> bool {
        match self.conds[id].waiters.first(&self.threads) {
            Some(first) => {
                self.wake(first);
                true
            }
            None => false,
        }
    }
}
