//! Threads (fluke-api 3).

use fluke_abi::code::{Insanity, Status, Wakeup};
use fluke_abi::state::{Handlers, PRIORITY_MAX, Registers, SavedState, ThreadFlags, ThreadState};

use super::generic::rehome;
use super::pick;
use crate::arena::Id;
use crate::call::{Call, Done, Stop};
use crate::ipc::Port;
use crate::kernel::Kernel;
use crate::lock::{self, scheduler};
use crate::mutant::mutant;
use crate::object::{Link, Object};
use crate::thread::{End, Side, Thread, Wait, user_address, user_flags};

/// Trivial.
pub fn thread_self(call: &mut Call) -> Done {
    let own = call.thread().thread_va;
    call.complete(own)
}

/// Stops a thread; waits, inside the kernel, until it is off its CPU. The call then looks at its parameters
/// again: meanwhile others may have unmade what they name.
fn stop(call: &mut Call, id: Id<Thread>) -> Result<(), Stop> {
    if call.kernel().stop(id) || mutant!(stop_not_awaited) {
        return Ok(());
    }
    call.wait(Wait::Stop(id))?;
    Err(Stop::Restart)
}

/// Commit point: detaching.
pub fn thread_destroy(call: &mut Call) -> Done {
    let id = call.other_thread(0)?;
    stop(call, id)?;
    call.kernel().destroy_thread(id);
    call.complete(0)
}

/// Commit point: detaching from the old memory.
pub fn thread_move(call: &mut Call) -> Done {
    let id = call.other_thread(0)?;
    stop(call, id)?;
    rehome(call, id)?;
    call.kernel().threads[id].set_flags(ThreadFlags::STOPPED, true);
    Ok(())
}

/// Commit point: posting.
pub fn thread_interrupt(call: &mut Call) -> Done {
    let id = call.other_thread(0)?;
    call.complete(0)?;
    if mutant!(completed_early) {
        lock::offer(call.entity);
    }
    call.kernel().post(id, ThreadFlags::INTERRUPT_PENDING);
    Ok(())
}

/// Trivial.
pub fn thread_disable_exceptions(call: &mut Call) -> Done {
    call.check_self()?;
    let thread = call.thread();
    thread.set_flags(ThreadFlags::EXCEPTION_ENABLE, false);
    call.complete(0)
}

/// Commit point: the change.
pub fn thread_enable_exceptions(call: &mut Call) -> Done {
    call.check_self()?;
    enable_exceptions(call);
    call.complete(0)
}

/// Reloads the saved registers, and with them whatever was interrupted.
pub fn thread_return_from_exception(call: &mut Call) -> Done {
    call.check_self()?;
    let thread = call.thread();
    let SavedState {
        rax,
        rcx,
        rdx,
        rip,
        rflags,
    } = thread.saved;
    let frame = &mut thread.frame;
    (frame.rax, frame.rcx, frame.rdx, frame.rip) = (rax, rcx, rdx, rip);
    frame.rflags = user_flags(rflags);
    thread.in_call = false;
    enable_exceptions(call);
    Ok(())
}

/// What was held back is taken on the way out.
fn enable_exceptions(call: &mut Call) {
    let entity = call.entity;
    let thread = call.thread();
    thread.set_flags(ThreadFlags::EXCEPTION_ENABLE, true);
    if thread.flags().intersects(PENDING) && !mutant!(attention_not_called) {
        scheduler().call_attention(entity);
    }
}

/// Commit point: the last write.
pub fn thread_get_handlers(call: &mut Call) -> Done {
    call.check_self()?;
    let Handlers {
        trap,
        interrupt,
        client_alert,
        server_alert,
    } = call.thread().handlers;
    for (n, handler) in [trap, interrupt, client_alert, server_alert]
        .iter()
        .enumerate()
    {
        let at = call.argument(n + 1);
        if at != 0 {
            call.write(at, handler)?;
        }
    }
    call.complete(0)
}

/// Commit point: the change.
pub fn thread_set_handlers(call: &mut Call) -> Done {
    call.check_self()?;
    let [trap, interrupt, client_alert, server_alert] = [1, 2, 3, 4].map(|n| call.argument(n));
    let handlers = Handlers {
        trap,
        interrupt,
        client_alert,
        server_alert,
    };
    check_handlers(&handlers)?;
    call.thread().handlers = handlers;
    call.complete(0)
}

/// Exceptions held back.
const PENDING: ThreadFlags = ThreadFlags::INTERRUPT_PENDING
    .union(ThreadFlags::CLIENT_ALERT_PENDING)
    .union(ThreadFlags::SERVER_ALERT_PENDING);

fn check_handlers(handlers: &Handlers) -> Result<(), Stop> {
    let Handlers {
        trap,
        interrupt,
        client_alert,
        server_alert,
    } = *handlers;
    match [trap, interrupt, client_alert, server_alert]
        .into_iter()
        .all(user_address)
    {
        true => Ok(()),
        false => Err(Insanity::InvalidAddress.into()),
    }
}

/// Commit point: the write.
pub fn thread_get_saved_state(call: &mut Call) -> Done {
    call.check_self()?;
    let saved = call.thread().saved;
    let at = call.argument(1);
    call.write(at, &saved)?;
    call.complete(0)
}

/// Commit point: after the read.
pub fn thread_set_saved_state(call: &mut Call) -> Done {
    call.check_self()?;
    let at = call.argument(1);
    let saved = call.read::<SavedState>(at)?;
    if !user_address(saved.rip) {
        return Err(Insanity::InvalidAddress.into());
    }
    call.thread().saved = saved;
    call.complete(0)
}

/// Reads the connection in the role `side`. Commit point: setting the link.
fn get_partner(call: &mut Call, side: Side) -> Done {
    call.check_self()?;
    let reference = call.reference(1)?;
    let flags_at = call.argument(2);
    let flags = call.thread().flags() & side.sender();
    if flags_at != 0 {
        call.write(flags_at, &flags.bits())?;
    }
    let id = call.id;
    let link = call.kernel().partner_link(id, side);
    call.set_link(reference, link);
    call.complete(0)
}

/// Replaces the connection in the role `side`. Commit point: the change.
fn set_partner(call: &mut Call, side: Side) -> Done {
    call.check_self()?;
    let partner = call.link(1, Insanity::NotThreadRef, pick::thread)?;
    let sender = ThreadFlags::from_bits_truncate(call.argument(2)).contains(side.sender());
    let id = call.id;
    if let Some(partner) = partner {
        call.kernel().set_partner(id, side, partner, sender);
    }
    call.complete(0)
}

/// The partner of a server is its client.
pub fn thread_get_client(call: &mut Call) -> Done {
    get_partner(call, Side::Server)
}

/// The partner of a client is its server.
pub fn thread_get_server(call: &mut Call) -> Done {
    get_partner(call, Side::Client)
}

/// As `thread_get_client`.
pub fn thread_set_client(call: &mut Call) -> Done {
    set_partner(call, Side::Server)
}

/// As `thread_get_server`.
pub fn thread_set_server(call: &mut Call) -> Done {
    set_partner(call, Side::Client)
}

/// Stops the thread, then writes its state. Commit point: the links, after the last write. The
/// thread being stopped does not matter to a call that starts over: it is stopped already.
pub fn thread_get_state(call: &mut Call) -> Done {
    let id = call.other_thread(0)?;
    let state_at = call.argument(1);
    if state_at != 0 {
        call.prepare_write::<ThreadState>(state_at)?;
    }
    let [task_ref, scheduler_ref, waiting_ref] =
        [call.reference(2)?, call.reference(3)?, call.reference(4)?];
    let [client_ref, server_ref] = [call.reference(5)?, call.reference(6)?];
    let kernel = call.kernel();
    let waiting_for = match kernel.threads[id].wait() {
        Some(wait) => wait_link(kernel, wait),
        None => None,
    };
    stop(call, id)?;
    let thread = &mut call.kernel().threads[id];
    let task = thread.space.map_or(Link::Null, Link::Task);
    let scheduler = thread.scheduler.map_or(Link::Null, Link::Port);
    let mut state = ThreadState::default();
    export(thread, &mut state);
    let waiting_for = waiting_for.unwrap_or(Link::Null);
    let kernel = call.kernel();
    let client = kernel.partner_link(id, Side::Server);
    let server = kernel.partner_link(id, Side::Client);
    if state_at != 0 {
        call.write(state_at, &state)?;
    }
    let thread = &mut call.kernel().threads[id];
    thread.set_flags(ThreadFlags::STOPPED, true);
    // Whoever holds a link to the partner can make the thread again; see `Kernel::destroy_thread`.
    for (side, reference, partner) in [
        (Side::Server, client_ref, client),
        (Side::Client, server_ref, server),
    ] {
        if reference.is_some() && partner != Link::Null {
            thread.ends[side as usize] = End::Exported;
        }
    }
    call.set_link(task_ref, task);
    call.set_link(scheduler_ref, scheduler);
    call.set_link(waiting_ref, waiting_for);
    call.set_link(client_ref, client);
    call.set_link(server_ref, server);
    call.complete(0)
}

/// The object that a wait is for, as far as there is one.
fn wait_link(kernel: &Kernel, wait: Wait) -> Option<Link> {
    match wait {
        Wait::Mutex(id) => Some(Link::Mutex(id)),
        Wait::Cond(id) => Some(Link::Cond(id)),
        Wait::Port(id) => Some(Link::Port(id)),
        Wait::Schedule { port, .. } => Some(Link::Port(kernel.ports.name_at(port))),
        Wait::Pset(id) => Some(Link::Pset(id)),
        Wait::Reply(id) | Wait::Stop(id) => Some(Link::Thread(id)),
        Wait::Send(_)
        | Wait::Receive(_)
        | Wait::Over(_)
        | Wait::Ack(_)
        | Wait::Ask(_)
        | Wait::Time(_)
        | Wait::Forever => None,
    }
}

fn export(thread: &mut Thread, state: &mut ThreadState) {
    let frame = &thread.frame;
    state.registers = Registers {
        r15: frame.r15,
        r14: frame.r14,
        r13: frame.r13,
        r12: frame.r12,
        rbp: frame.rbp,
        rbx: frame.rbx,
        r11: frame.r11,
        r10: frame.r10,
        r9: frame.r9,
        r8: frame.r8,
        rdi: frame.rdi,
        rsi: frame.rsi,
        rdx: frame.rdx,
        rcx: frame.rcx,
        rax: frame.rax,
        rip: frame.rip,
        rflags: user_flags(frame.rflags),
        rsp: frame.rsp,
    };
    if mutant!(register_not_exported) {
        state.registers.rbx = 0;
    }
    let mut flags = thread.flags();
    if mutant!(pending_not_exported) {
        flags -= PENDING;
    }
    if mutant!(sender_not_exported) {
        flags -= Side::Client.sender() | Side::Server.sender();
    }
    state.flags = flags.bits();
    state.thread_va = thread.thread_va;
    state.sched_val = thread.sched_val;
    state.priority = thread.priority.into();
    if !mutant!(handlers_not_exported) {
        state.handlers = thread.handlers;
    }
    state.saved = thread.saved;
    if !mutant!(pset_not_exported) {
        state.server_pset = thread.server_pset;
    }
    if !mutant!(fpu_not_exported) {
        state.fpu = *scheduler().entities[thread.entity].fpu.image();
    }
    state.hash = thread.header().hash;
}

/// Checks what a state must be for the kernel to be able to run it; all else is the user's affair.
fn check_state(state: &ThreadState) -> Result<(), Stop> {
    let Registers { rip, rsp, .. } = state.registers;
    let addresses = [rip, rsp, state.saved.rip];
    if !addresses.into_iter().all(user_address) || state.priority > PRIORITY_MAX {
        return Err(Insanity::InvalidAddress.into());
    }
    check_handlers(&state.handlers)
}

fn import(thread: &mut Thread, state: &ThreadState) {
    let registers = &state.registers;
    let frame = &mut thread.frame;
    frame.r15 = registers.r15;
    frame.r14 = registers.r14;
    frame.r13 = registers.r13;
    frame.r12 = registers.r12;
    frame.rbp = registers.rbp;
    frame.rbx = registers.rbx;
    frame.r11 = registers.r11;
    frame.r10 = registers.r10;
    frame.r9 = registers.r9;
    frame.r8 = registers.r8;
    frame.rdi = registers.rdi;
    frame.rsi = registers.rsi;
    frame.rdx = registers.rdx;
    frame.rcx = registers.rcx;
    frame.rax = registers.rax;
    frame.rip = registers.rip;
    frame.rflags = user_flags(registers.rflags);
    frame.rsp = registers.rsp;
    let mut flags = ThreadFlags::from_bits_truncate(state.flags);
    if mutant!(exceptions_not_imported) {
        flags -= ThreadFlags::EXCEPTION_ENABLE;
    }
    // The rest is said by its links, and last.
    let own = PENDING | ThreadFlags::EXCEPTION_ENABLE;
    thread.set_flags(own, false);
    thread.set_flags(own & flags, true);
    thread.thread_va = state.thread_va;
    thread.sched_val = state.sched_val;
    if !mutant!(priority_not_imported) {
        thread.priority = state.priority as u8;
    }
    thread.handlers = state.handlers;
    thread.saved = state.saved;
    thread.server_pset = state.server_pset;
    scheduler().set_fpu(thread.entity, &state.fpu);
    thread.in_call = false;
}

/// Commit point: after all reads and checks.
pub fn thread_set_state(call: &mut Call) -> Done {
    let id = call.other_thread(0)?;
    let state_at = call.argument(1);
    let task = call.link(2, Insanity::NotTaskRef, pick::task)?;
    let new_scheduler = call.link(3, Insanity::NotPortRef, pick::port)?;
    call.reference(4)?;
    let client = call.link(5, Insanity::NotThreadRef, pick::thread)?;
    let server = call.link(6, Insanity::NotThreadRef, pick::thread)?;
    let state = if state_at == 0 {
        None
    } else {
        Some(call.read::<ThreadState>(state_at)?)
    };
    if let Some(state) = &state {
        check_state(state)?;
    }
    stop(call, id)?;
    let kernel = call.kernel();
    if let Some(task) = task {
        kernel.set_space(id, task);
    }
    let thread = &mut kernel.threads[id];
    if let Some(port) = new_scheduler {
        thread.scheduler = port;
    }
    let mut flags = ThreadFlags::STOPPED;
    if let Some(state) = &state {
        flags = ThreadFlags::from_bits_truncate(state.flags);
        import(thread, state);
    }
    for (side, partner) in [(Side::Server, client), (Side::Client, server)] {
        if let Some(partner) = partner {
            kernel.set_partner(id, side, partner, flags.contains(side.sender()));
        }
        // The thread is back in use: its connections are its own again.
        let end = &mut kernel.threads[id].ends[side as usize];
        if *end == End::Exported {
            *end = End::Joined;
        }
    }
    call.complete(0)?;
    let kernel = call.kernel();
    let stopped = flags.contains(ThreadFlags::STOPPED);
    kernel.threads[id].set_flags(ThreadFlags::STOPPED, stopped);
    if !stopped {
        scheduler().call_attention(kernel.threads[id].entity);
        kernel.make_ready(id);
    }
    Ok(())
}

/// The donation is the wait, and ends with it. Commit point: its end.
pub fn thread_schedule(call: &mut Call) -> Done {
    let target = call.other_thread(0)?;
    let port = call.object::<Port>(1)?;
    if Wakeup::from_number(call.argument(2)).is_none() {
        return Err(Insanity::InvalidObject.into());
    }
    let kernel = call.kernel();
    if !kernel.ports[port].clients.is_empty() {
        return call.complete(Status::Success as u64);
    }
    if kernel.wants_time(target).is_none() {
        return call.complete(Status::TimeUnused as u64);
    }
    let port = port.into();
    call.wait(Wait::Schedule { target, port })
}

/// Commit point: none; sleeping changes nothing.
pub fn thread_sleep(call: &mut Call) -> Done {
    let deadline = call.argument(0);
    loop {
        if scheduler().clock.now() >= deadline {
            return call.complete(0);
        }
        call.sleep_until(deadline)?;
    }
}
