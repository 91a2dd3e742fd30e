//! Which statuses and insanities each entry point can end with.
//!
//! Most follow from the types of an entry point's parameters, so that is where they are taken from;
//! what is left is said here by name. The program `wild` checks every exception it provokes
//! against [`Row::may_raise`].

use crate::code::{Insanity, Status};
use crate::entry::{Convention, Entry, Row};

/// The name of the type that a parameter of type `ty` points to; `None` if it is no pointer.
pub fn pointee(ty: &str) -> Option<&str> {
    ty.starts_with('*')
        .then(|| ty.rsplit(' ').next().unwrap_or(ty))
}

/// The insanity of a handle that names an object of another type than `ty`.
fn wrong_object(ty: &str) -> Option<Insanity> {
    Some(match ty {
        "Thread" => Insanity::NotThread,
        "Task" => Insanity::NotTask,
        "Region" => Insanity::NotRegion,
        "Mapping" => Insanity::NotMapping,
        "Port" => Insanity::NotPort,
        "Pset" => Insanity::NotPset,
        "Mutex" => Insanity::NotMutex,
        "Cond" => Insanity::NotCond,
        "Ref" => Insanity::NotRef,
        _ => return None,
    })
}

/// The insanity of a reference, given as parameter `name`, that links to another type of object.
fn wrong_link(name: &str) -> Option<Insanity> {
    Some(match name {
        "task" => Insanity::NotTaskRef,
        "region" => Insanity::NotRegionRef,
        "pset" => Insanity::NotPsetRef,
        "keeper" | "scheduler" | "dest" => Insanity::NotPortRef,
        "owner" | "inheritor" | "client" | "server" => Insanity::NotThreadRef,
        _ => return None,
    })
}

impl Row {
    /// Whether the name without the family's prefix is `operation`.
    fn is(&self, operation: &str) -> bool {
        let rest = self.name.split_once('_').map(|(_, rest)| rest);
        rest == Some(operation)
    }

    fn creates(&self) -> bool {
        self.is("create") || self.is("create_hash")
    }

    /// Whether parameter `name` is memory without an object, in which the call leaves one.
    pub fn fills(&self, name: &str) -> bool {
        name == "new_addr" || self.creates() && name.starts_with("new_")
    }

    /// Whether it sets links from its reference parameters, rather than filling them.
    fn sets_links(&self) -> bool {
        matches!(self.convention, Convention::Message)
            || ["set_state", "set_client", "set_server"]
                .iter()
                .any(|name| self.is(name))
    }

    /// Whether parameter `name` may make the call raise `insanity`.
    fn parameter_may_raise(&self, name: &str, ty: &str, insanity: Insanity) -> bool {
        if name == "cur_thread" {
            return insanity == Insanity::NotCurrentThread;
        }
        if name == "prot" || name == "max_prot" {
            return insanity == Insanity::InvalidProt;
        }
        let Some(wrong) = pointee(ty).and_then(wrong_object) else {
            return false;
        };
        let fresh = self.fills(name);
        match insanity {
            Insanity::NotAligned => true,
            Insanity::ObjectExists => fresh,
            Insanity::NoObject => !fresh,
            Insanity::CurrentThread => {
                wrong == Insanity::NotThread && !fresh && !self.is("reference")
            }
            _ if insanity == wrong => !fresh,
            _ => {
                self.sets_links() && wrong == Insanity::NotRef && wrong_link(name) == Some(insanity)
            }
        }
    }

    /// Whether the call can raise `insanity`, in any of the entry points it may turn into.
    pub fn may_raise(&self, insanity: Insanity) -> bool {
        use Insanity::*;
        let of_parameters = self
            .parameters
            .iter()
            .any(|(name, ty)| self.parameter_may_raise(name, ty, insanity));
        let message = matches!(self.convention, Convention::Message);
        // What the references in a message and its buffers can do wrong.
        let of_message =
            message && matches!(insanity, NotAligned | NoObject | NotRef | BufferUnaligned);
        // Who is in a connection has the right role, or not, when the call begins: each stage leaves the one
        // that the next needs.
        let begins = |word| {
            let mut words = self.name.split('_').skip(1);
            message
                && matches!(words.next(), Some("client" | "server"))
                && words.next() == Some(word)
        };
        let of_role = match insanity {
            NotSender => begins("send") || begins("over"),
            NotReceiver => begins("ack") || begins("receive"),
            // The set that the caller serves may have become another object.
            NotPset => message && self.has(&["wait"]),
            _ => false,
        };
        of_parameters
            || of_message
            || of_role
            || match Entry::from_number(self.number) {
                None => false,
                _ if !self.built => insanity == NoEntry,
                Some(Entry::mutex_lock | Entry::mutex_destroy) => insanity == MutexLocked,
                Some(Entry::mutex_unlock) => matches!(insanity, MutexNotLocked | MutexNotOwner),
                Some(Entry::cond_wait) => {
                    matches!(insanity, MutexNotLocked | MutexNotOwner | MutexLocked)
                }
                Some(Entry::region_set_state | Entry::mapping_set_state) => {
                    matches!(
                        insanity,
                        NotAligned | InvalidAddress | InvalidProt | AddressOverlap
                    )
                }
                Some(
                    Entry::thread_set_state
                    | Entry::thread_set_handlers
                    | Entry::thread_set_saved_state,
                ) => insanity == InvalidAddress,
                Some(Entry::thread_schedule) => insanity == InvalidObject,
                Some(Entry::machine_exit) => insanity == NotRoot,
                Some(Entry::supervisor_call) => matches!(insanity, NotKernel | InvalidAddress),
                Some(_) => false,
            }
    }

    /// Whether one of these words is in the name.
    fn has(&self, words: &[&str]) -> bool {
        self.name.split('_').any(|word| words.contains(&word))
    }

    /// Whether the call can end with `status`. Calls that return a value have no status.
    pub fn may_return(&self, status: Status) -> bool {
        use Status::*;
        let message = matches!(self.convention, Convention::Message);
        let stage = |words: &[&str]| message && self.has(words);
        match status {
            Success => !self.returns_value(),
            NoMemory => self.creates(),
            MutexHeld => self.is("trylock"),
            InvalidDest => self.is("send"),
            ConnectInvalidDest => stage(&["call", "connect"]),
            SendDisconnected => stage(&["client", "server"]) && stage(&["send"]),
            OverDisconnected => stage(&["over"]),
            AckDisconnected => stage(&["ack"]),
            RecvDisconnected | RecvMoreData | RecvMoreRefs => stage(&["receive"]),
            TimeUnused => self.is("schedule"),
        }
    }

    /// Whether `rax` comes back with a value and not with a [`Status`].
    pub fn returns_value(&self) -> bool {
        use Entry::*;
        matches!(
            Entry::from_number(self.number),
            Some(
                thread_self
                    | ref_check
                    | ref_compare
                    | ref_hash
                    | ref_type
                    | clock_read
                    | cpu_self
                    | supervisor_call
                    | machine_listen
            )
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::TABLE;

    #[test]
    fn some_that_are_known() {
        let raises = |entry: Entry, insanity| entry.row().may_raise(insanity);
        assert!(raises(Entry::mutex_create, Insanity::ObjectExists));
        assert!(!raises(Entry::mutex_create, Insanity::NoObject));
        assert!(raises(Entry::thread_destroy, Insanity::CurrentThread));
        assert!(!raises(Entry::thread_reference, Insanity::CurrentThread));
        assert!(raises(Entry::port_set_state, Insanity::NotPsetRef));
        assert!(!raises(Entry::port_get_state, Insanity::NotPsetRef));
        assert!(raises(Entry::ipc_client_connect_send, Insanity::NotPortRef));
        assert!(!raises(Entry::ipc_client_disconnect, Insanity::NotSender));
        assert!(!raises(Entry::ipc_send, Insanity::NotSender));
        assert!(!raises(Entry::ipc_client_ack_send, Insanity::NotSender));
        assert!(raises(Entry::ipc_client_ack_send, Insanity::NotReceiver));
        assert!(raises(Entry::ipc_wait_receive, Insanity::NotPset));
        let returns = |entry: Entry, status| entry.row().may_return(status);
        assert!(returns(Entry::ipc_send, Status::InvalidDest));
        assert!(!returns(Entry::ipc_client_send, Status::InvalidDest));
        assert!(!returns(Entry::ipc_send, Status::SendDisconnected));
        assert!(returns(Entry::ipc_server_send, Status::SendDisconnected));
        assert!(!returns(Entry::clock_read, Status::Success));
    }

    #[test]
    fn every_code_belongs_to_an_entry_point() {
        for &status in Status::ALL {
            assert!(TABLE.iter().any(|row| row.may_return(status)), "{status:?}");
        }
        // Not used by this kernel: a stopped thread is safe to manipulate; and every entry point
        // is built.
        let unused = [Insanity::RaceCondition, Insanity::NoEntry];
        for &insanity in Insanity::ALL {
            let known = TABLE.iter().any(|row| row.may_raise(insanity));
            assert_ne!(known, unused.contains(&insanity), "{insanity:?}");
        }
    }
}
