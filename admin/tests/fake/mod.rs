//! An engine that keeps states and replicates nothing, for tests of the command line.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Condvar, Mutex};

use palisade_control::{
    Action, ClientMessage, Command, ConnectionState, ConnectionStatus, DeviceStatistics, DeviceStatus,
    DiskState, Event, EventBatch, FrameDecoder, GenerationInfo, PROTOCOL_VERSION, PathStatus, Payload,
    PeerDeviceStatus, ReplicationState, Reply, ResourceStatus, ResyncSuspended, Role, RunningBacking,
    RunningConnection, RunningPath, RunningPeerDevice, RunningResource, RunningVolume, ServerMessage,
    TimeoutType, WriteOrdering, code, diff, encode,
};

#[derive(Default)]
struct State {
    running: Option<RunningResource>,
    primary: bool,
    up_to_date: bool,
    /// Counts changes, so that subscribers know when to look.
    version: u64,
    ended: bool,
}

type Shared = Arc<(Mutex<State>, Condvar)>;

/// Serves a resource on `$PALISADE_RUNTIME_DIR/RESOURCE.sock` until `down`.
pub fn serve(resource: &str) {
    let path = palisade_control::socket_path(resource);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).unwrap();
    let shared: Shared = Arc::default();
    {
        let shared = Arc::clone(&shared);
        let resource = resource.to_owned();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (shared, resource) = (Arc::clone(&shared), resource.clone());
                std::thread::spawn(move || converse(stream.unwrap(), &shared, &resource));
            }
        });
    }
    let (lock, changed) = &*shared;
    let mut state = lock.lock().unwrap();
    while !state.ended {
        state = changed.wait(state).unwrap();
    }
    let _ = std::fs::remove_file(&path);
    drop(state);
    // Let the last answer and the last events out.
    std::thread::sleep(std::time::Duration::from_millis(50));
}

fn converse(mut stream: UnixStream, shared: &Shared, resource: &str) {
    let mut decoder = FrameDecoder::new();
    let mut chunk = [0_u8; 4096];
    loop {
        while let Some(message) = decoder.next_message::<ClientMessage>().unwrap() {
            let answer = match message {
                ClientMessage::Hello { .. } => ServerMessage::Hello {
                    protocol: PROTOCOL_VERSION,
                    resource: resource.to_owned(),
                    version: "fake".into(),
                },
                ClientMessage::Request { id, command: Command::Subscribe } => {
                    send(&mut stream, &ServerMessage::Reply { id, reply: Reply::done() });
                    return stream_events(&mut stream, shared);
                }
                ClientMessage::Request { id, command } => {
                    let (lock, changed) = &**shared;
                    let mut state = lock.lock().unwrap();
                    let ends = matches!(command, Command::Down | Command::DelResource);
                    let reply = handle(&mut state, command);
                    state.version += 1;
                    send(&mut stream, &ServerMessage::Reply { id, reply });
                    state.ended |= ends;
                    changed.notify_all();
                    continue;
                }
            };
            send(&mut stream, &answer);
        }
        match stream.read(&mut chunk) {
            Ok(0) | Err(_) => return,
            Ok(n) => decoder.push(&chunk[..n]),
        }
    }
}

fn send(stream: &mut UnixStream, message: &ServerMessage) {
    let _ = stream.write_all(&encode(message).unwrap());
}

fn stream_events(stream: &mut UnixStream, shared: &Shared) {
    let (lock, changed) = &**shared;
    let mut state = lock.lock().unwrap();
    let mut old = status(&state);
    let mut events = diff(None, old.as_ref(), true);
    events.push(Event::ExistsEnd);
    loop {
        if !events.is_empty() {
            let batch = EventBatch { time_us: 1_795_190_400_000_000, events: std::mem::take(&mut events) };
            if stream.write_all(&encode(&ServerMessage::Events(batch)).unwrap()).is_err() {
                return;
            }
        }
        if state.ended {
            return;
        }
        let seen = state.version;
        while state.version == seen && !state.ended {
            state = changed.wait(state).unwrap();
        }
        let new = status(&state);
        events = diff(old.as_ref(), new.as_ref(), false);
        debug_assert!(events.iter().all(|e| !matches!(e, Event::Resource { action: Action::Exists, .. })));
        old = new;
    }
}

fn handle(state: &mut State, command: Command) -> Reply {
    match command {
        Command::Status => return Reply::with(Payload::Status(status(state))),
        Command::Show => {
            let none = || RunningResource {
                name: "none".into(),
                node_id: -1,
                options: Default::default(),
                volumes: Vec::new(),
                connections: Vec::new(),
                handlers: Default::default(),
            };
            return Reply::with(Payload::Running(state.running.clone().unwrap_or_else(none)));
        }
        Command::NewResource { name, node_id, options } => {
            if state.running.is_some() {
                return Reply::refused(code::ALREADY_EXISTS);
            }
            state.running = Some(RunningResource {
                name,
                node_id: node_id.into(),
                options,
                volumes: Vec::new(),
                connections: Vec::new(),
                handlers: Default::default(),
            });
            return Reply::done();
        }
        Command::Down => {
            state.running = None;
            return Reply::done();
        }
        Command::Primary { force } => {
            if !force && !state.up_to_date {
                return Reply::refused(code::NO_UP_TO_DATE_DISK);
            }
            state.up_to_date = true;
            state.primary = true;
            return Reply::done();
        }
        Command::Secondary { .. } => {
            state.primary = false;
            return Reply::done();
        }
        Command::GetGi { .. } => {
            let gi = GenerationInfo { current: 4, consistent: true, ..GenerationInfo::default() };
            return Reply::with(Payload::GenerationInfo(gi));
        }
        Command::TimeoutType { .. } => return Reply::with(Payload::Timeout(TimeoutType::Default)),
        command @ (Command::Verify { .. } | Command::Resize { .. }) => return Reply::unsupported(&command),
        _ => {}
    }
    let Some(running) = &mut state.running else { return Reply::refused(code::RES_NOT_KNOWN) };
    configure(running, command)
}

fn configure(running: &mut RunningResource, command: Command) -> Reply {
    match command {
        Command::ResourceOptions { options, .. } => running.options = options,
        Command::Handlers { handlers, .. } => running.handlers = handlers,
        Command::NewMinor { minor, volume, options } => running.volumes.push(RunningVolume {
            volume,
            minor,
            client: options.flag("diskless") == Some(true),
            device_options: options,
            backing: None,
        }),
        Command::DelMinor { minor } => running.volumes.retain(|v| v.minor != minor),
        Command::NewPeer { peer_node_id, name, options } => running.connections.push(RunningConnection {
            peer_node_id,
            name,
            connection_state: ConnectionState::StandAlone,
            paths: Vec::new(),
            options,
            peer_devices: Vec::new(),
        }),
        Command::DelPeer { peer_node_id, .. } => {
            running.connections.retain(|c| c.peer_node_id != peer_node_id);
        }
        Command::Attach { minor, backing_device, meta_device, meta_index, options } => {
            let Some(volume) = running.volumes.iter_mut().find(|v| v.minor == minor) else {
                return Reply::refused(code::MINOR_INVALID);
            };
            volume.backing =
                Some(RunningBacking { disk: backing_device, meta_disk: meta_device, meta_index, options });
        }
        Command::Detach { minor, .. } => {
            if let Some(volume) = running.volumes.iter_mut().find(|v| v.minor == minor) {
                volume.backing = None;
            }
        }
        other => return on_connection(running, other),
    }
    Reply::done()
}

fn on_connection(running: &mut RunningResource, command: Command) -> Reply {
    let id = match &command {
        Command::NewPath { peer_node_id, .. }
        | Command::DelPath { peer_node_id, .. }
        | Command::NetOptions { peer_node_id, .. }
        | Command::PeerDeviceOptions { peer_node_id, .. }
        | Command::Connect { peer_node_id, .. }
        | Command::Disconnect { peer_node_id, .. } => *peer_node_id,
        other => return Reply::unsupported(other),
    };
    let Some(connection) = running.connections.iter_mut().find(|c| c.peer_node_id == id) else {
        return Reply::refused(code::INVALID_PEER_NODE_ID);
    };
    match command {
        Command::NewPath { local, remote, .. } => connection.paths.push(RunningPath { local, remote }),
        Command::DelPath { local, remote, .. } => {
            connection.paths.retain(|p| *p != RunningPath { local: local.clone(), remote: remote.clone() });
        }
        Command::NetOptions { options, .. } => connection.options = options,
        Command::PeerDeviceOptions { volume, options, .. } => {
            connection.peer_devices.retain(|p| p.volume != volume);
            connection.peer_devices.push(RunningPeerDevice { volume, options });
        }
        Command::Connect { .. } => connection.connection_state = ConnectionState::Connecting,
        _ => connection.connection_state = ConnectionState::StandAlone,
    }
    Reply::done()
}

fn status(state: &State) -> Option<ResourceStatus> {
    let running = state.running.as_ref()?;
    let disk = |backed: bool| match (backed, state.up_to_date) {
        (false, _) => DiskState::Diskless,
        (true, false) => DiskState::Inconsistent,
        (true, true) => DiskState::UpToDate,
    };
    Some(ResourceStatus {
        name: running.name.clone(),
        node_id: running.node_id,
        role: if state.primary { Role::Primary } else { Role::Secondary },
        suspended_user: false,
        suspended_no_data: false,
        suspended_fencing: false,
        suspended_quorum: false,
        force_io_failures: false,
        write_ordering: WriteOrdering::Flush,
        devices: running
            .volumes
            .iter()
            .map(|v| DeviceStatus {
                volume: v.volume,
                minor: v.minor,
                disk_state: disk(v.backing.is_some()),
                client: v.client,
                open: Some(false),
                quorum: true,
                backing_dev: v.backing.as_ref().map(|b| b.disk.clone()),
                statistics: Some(DeviceStatistics { size: 4056, ..DeviceStatistics::default() }),
            })
            .collect(),
        connections: running
            .connections
            .iter()
            .map(|c| ConnectionStatus {
                peer_node_id: c.peer_node_id.into(),
                name: c.name.clone(),
                connection_state: c.connection_state,
                congested: false,
                peer_role: Role::Unknown,
                tls: None,
                ap_in_flight: Some(0),
                rs_in_flight: Some(0),
                paths: Some(
                    c.paths
                        .iter()
                        .map(|p| PathStatus {
                            this_host: p.local.clone(),
                            remote_host: p.remote.clone(),
                            established: false,
                        })
                        .collect(),
                ),
                peer_devices: running
                    .volumes
                    .iter()
                    .map(|v| PeerDeviceStatus {
                        volume: v.volume,
                        replication_state: ReplicationState::Off,
                        peer_disk_state: DiskState::DUnknown,
                        peer_client: false,
                        resync_suspended: ResyncSuspended::default(),
                        received: 0,
                        sent: 0,
                        out_of_sync: 0,
                        pending: 0,
                        unacked: 0,
                        resync_done_percent: None,
                        stable: true,
                        sync: None,
                    })
                    .collect(),
            })
            .collect(),
    })
}
