//! The entry points of IPC that move no message; the others are in `ipc::engine`.

use crate::call::{Call, Done};
use crate::thread::Side;

fn disconnect(call: &mut Call, side: Side) -> Done {
    let id = call.id;
    call.kernel().disconnect(id, side);
    call.complete(0)
}

fn alert(call: &mut Call, side: Side) -> Done {
    let id = call.id;
    // Nobody is to see the call done and the partner without the alert.
    call.kernel();
    call.complete(0)?;
    call.kernel().alert(id, side);
    Ok(())
}

/// Commit point: breaking the connection.
pub fn ipc_client_disconnect(call: &mut Call) -> Done {
    disconnect(call, Side::Client)
}

/// Commit point: breaking the connection.
pub fn ipc_server_disconnect(call: &mut Call) -> Done {
    disconnect(call, Side::Server)
}

/// Commit point: posting the alert.
pub fn ipc_client_alert(call: &mut Call) -> Done {
    alert(call, Side::Client)
}

/// Commit point: posting the alert.
pub fn ipc_server_alert(call: &mut Call) -> Done {
    alert(call, Side::Server)
}
