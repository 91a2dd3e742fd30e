//! A machine under gdb: `flukevm run --gdb`.
//!
//! * `line`: the connection, of the control plane.
//! * `target`: what gdb's protocol asks of a machine; the protocol itself is [`gdbstub`]'s.
//! * `debuggee`: which vCPUs run to what, and why one has stopped.
//! * `calls`: catching calls of entry points.
//! * `monitor`: commands that gdb does not know.
//!
//! One loop in the machine's own thread hears vCPUs, the debugger, signals and other processes, one at a time.
//! All vCPUs stop when one does. A debugger that goes away, or sends what is no protocol, leaves a
//! machine that runs on, and another one may connect to it.

pub mod address;
mod calls;
mod debuggee;
pub(crate) mod line;
mod monitor;
mod registers;
mod target;

use gdbstub::common::Signal;
use gdbstub::conn::Connection;
use gdbstub::stub::state_machine::GdbStubStateMachine;
use gdbstub::stub::{DisconnectReason, GdbStub, GdbStubError};

use crate::control::Event;
use crate::error::{Error, STATUS_MISUSE};
use crate::remote::{Answer, Request, serve};
use crate::stop::StopReason;
use crate::vm::{Outcome, Vm};

use address::Address;
use debuggee::{Debuggee, Reason, tid};
use line::Said;

/// Longest packet, bytes. gdb reads the kernel image in such.
const PACKET_MAX: usize = 64 << 10;
/// Longest answer, bytes: more than any view has.
const ANSWER_MAX: usize = 16 << 20;

/// What is to be said to the debugger.
#[derive(Default)]
struct Answers(Vec<u8>);

/// An answer is too long.
#[derive(Debug, thiserror::Error)]
#[error("the answer would be too long")]
struct TooLong;

impl Connection for Answers {
    type Error = TooLong;

    fn write(&mut self, byte: u8) -> Result<(), TooLong> {
        match self.0.len() < ANSWER_MAX {
            true => self.0.push(byte),
            false => return Err(TooLong),
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), TooLong> {
        Ok(())
    }
}

type Stub = GdbStubStateMachine<'static, Debuggee, Answers>;
type Next = Result<Stub, GdbStubError<std::convert::Infallible, TooLong>>;

/// Runs a machine to its end, paused until a debugger that connects to the address lets it run.
///
/// # Errors
/// If no debugger can connect there. Whatever the guest does is an [`Outcome`].
pub fn run(mut vm: Vm, address: &Address) -> Result<Outcome, Error> {
    let address = vm.control.expect_debugger(address)?;
    eprintln!("flukevm: paused; to debug the machine: gdb -ex 'target remote {address}'");
    let session = Session {
        debuggee: Debuggee::new(vm),
        stub: None,
        unended: 0,
        killed: false,
    };
    Ok(session.run())
}

struct Session {
    debuggee: Debuggee,
    /// Where the protocol is; none while nobody debugs the machine.
    stub: Option<Stub>,
    /// Bytes since the last end of a packet: the protocol's crate would keep any number.
    unended: usize,
    /// The debugger has asked for the machine's end.
    killed: bool,
}

impl Session {
    fn run(mut self) -> Outcome {
        let stop = loop {
            match self.debuggee.vm.next_event(None) {
                Event::Stopped(stop) => {
                    self.tell_the_end(&stop);
                    break stop;
                }
                Event::Hit(vcpu, dr6) => {
                    let reason = self.debuggee.hit(vcpu as usize, dr6);
                    self.tell(reason);
                }
                Event::Said(Said::Bytes(bytes)) => self.hear(&bytes),
                Event::Said(Said::Gone) if self.stub.is_some() => self.let_go(),
                Event::Said(Said::Gone) | Event::Due => {}
                Event::Asked((request, answer)) => {
                    // Whoever asked may be gone.
                    let _ = answer.send(self.asked(&request));
                }
            }
            if self.killed {
                break StopReason::Interrupted("gdb");
            }
        };
        self.debuggee.vm.finish(stop)
    }

    /// Hears a debugger; the first thing that one says stops the machine.
    fn hear(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.unended = if *byte == b'#' { 0 } else { self.unended + 1 };
            if self.unended > PACKET_MAX {
                return self.fail(&"a packet does not end");
            }
            let stub = match self.stub.take() {
                Some(stub) => stub,
                None if self.debuggee.stop().is_ok() => match self.stub() {
                    Ok(stub) => stub,
                    Err(error) => return self.fail(&error),
                },
                // What has stopped it for good is heard next.
                None => return,
            };
            let debuggee = &mut self.debuggee;
            let next = match stub {
                GdbStubStateMachine::Idle(stub) => stub.incoming_data(debuggee, *byte),
                GdbStubStateMachine::Running(stub) => stub.incoming_data(debuggee, *byte),
                other => Ok(other),
            };
            self.settle(next);
            if self.stub.is_none() {
                return;
            }
        }
    }

    fn stub(&mut self) -> Next {
        let stub = GdbStub::builder(Answers::default()).packet_buffer_size(PACKET_MAX);
        match stub.build() {
            Ok(stub) => stub.run_state_machine(&mut self.debuggee),
            Err(error) => unreachable!("the buffer is the builder's own: {error}"),
        }
    }

    /// Does what the protocol's state asks for, until it waits for something.
    fn settle(&mut self, mut next: Next) {
        loop {
            let mut stub = match next {
                Ok(stub) => stub,
                Err(error) => return self.fail(&error),
            };
            let answers = std::mem::take(match &mut stub {
                GdbStubStateMachine::Idle(stub) => stub.borrow_conn(),
                GdbStubStateMachine::Running(stub) => stub.borrow_conn(),
                GdbStubStateMachine::CtrlCInterrupt(stub) => stub.borrow_conn(),
                GdbStubStateMachine::Disconnected(stub) => stub.borrow_conn(),
            });
            let control = &mut self.debuggee.vm.control;
            if !answers.0.is_empty() && !control.answer_debugger(&answers.0) {
                return self.let_go();
            }
            let runs = self.debuggee.vm.is_running();
            next = match stub {
                GdbStubStateMachine::Running(stub) if !runs => match self.debuggee.go() {
                    Some(reason) => stub.report_stop(&mut self.debuggee, reason),
                    None => return self.stub = Some(stub.into()),
                },
                GdbStubStateMachine::CtrlCInterrupt(stub) => {
                    // One that comes too late is for a stop that has been told.
                    let stopped = runs && self.debuggee.stop().is_ok();
                    let interrupted = Reason::SignalWithThread {
                        tid: tid(0),
                        signal: Signal::SIGINT,
                    };
                    let reason = stopped.then_some(interrupted);
                    stub.interrupt_handled(&mut self.debuggee, reason)
                }
                GdbStubStateMachine::Disconnected(ended) => {
                    self.killed = matches!(ended.get_reason(), DisconnectReason::Kill);
                    if self.killed {
                        // The protocol's crate says nothing, and gdb waits for it.
                        let control = &mut self.debuggee.vm.control;
                        control.answer_debugger(b"$OK#9a");
                    }
                    return self.let_go();
                }
                waits => return self.stub = Some(waits),
            };
        }
    }

    /// Tells the debugger why the machine has stopped.
    fn tell(&mut self, reason: Option<Reason>) {
        if let Some(reason) = reason
            && let Some(stub) = self.stub.take()
        {
            let next = match stub {
                GdbStubStateMachine::Running(stub) => stub.report_stop(&mut self.debuggee, reason),
                other => Ok(other),
            };
            self.settle(next);
        }
    }

    /// Tells it that the machine has ended. One that believes the machine stopped can only be hung up on.
    fn tell_the_end(&mut self, stop: &StopReason) {
        if let Some(GdbStubStateMachine::Running(stub)) = self.stub.take() {
            let exited = Reason::Exited(stop.status());
            let next = stub.report_stop(&mut self.debuggee, exited);
            self.settle(next);
        }
    }

    fn fail(&mut self, error: &dyn std::fmt::Display) {
        tracing::warn!("hung up on the debugger: {error}");
        self.let_go();
    }

    /// The end of debugging: hangs up, and lets the machine run on.
    fn let_go(&mut self) {
        self.debuggee.vm.control.drop_debugger();
        self.stub = None;
        self.unended = 0;
        if !self.killed {
            self.debuggee.let_go();
        }
    }

    /// Answers another process. While the machine is debugged, nobody else lets it run or stops it.
    fn asked(&mut self, request: &Request) -> Answer {
        let debugged = self.stub.is_some();
        match request {
            Request::Status => serve(&mut self.debuggee.vm, request),
            _ if !debugged => serve(&mut self.debuggee.vm, request),
            Request::Inspect(_) if self.debuggee.vm.is_running() => {
                // What stops it meanwhile is told when it goes on.
                let _ = self.debuggee.stop();
                let mut answer = serve(&mut self.debuggee.vm, request);
                if let Answer::Seen { paused, .. } = &mut answer {
                    *paused = true;
                }
                let reason = self.debuggee.go();
                self.tell(reason);
                answer
            }
            Request::Inspect(_) => serve(&mut self.debuggee.vm, request),
            Request::Pause | Request::Resume | Request::Step { .. } => Answer::Refused {
                why: "a debugger has the machine; stop it, step it and let it run there".into(),
                status: STATUS_MISUSE,
            },
        }
    }
}
