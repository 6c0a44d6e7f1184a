//! What the tests with real binaries share.
#![expect(dead_code, reason = "each test binary uses a part of it")]

use std::io::{BufRead, BufReader};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

/// No step of a test takes longer, however busy the machine is.
pub const LIMIT: Duration = Duration::from_secs(120);

pub fn golden_checkpoint() -> PathBuf {
    grail_golden::path("models/qwen2-tied")
}

/// Copies the golden checkpoint, so that a test may change it.
pub fn copy_checkpoint(into: &Path, name: &str) -> PathBuf {
    let folder = into.join(name);
    std::fs::create_dir(&folder).unwrap();
    for entry in std::fs::read_dir(golden_checkpoint()).unwrap() {
        let file = entry.unwrap();
        if !file.file_name().to_string_lossy().starts_with("expected") {
            std::fs::copy(file.path(), folder.join(file.file_name())).unwrap();
        }
    }
    folder
}

/// Other weights of the same shape: the last tensors' bytes in reverse order of elements.
pub fn other_weights(folder: &Path) {
    let path = folder.join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let half = bytes.len() / 2;
    let half = half - half % 2;
    let mut elements: Vec<[u8; 2]> = bytes[half..].chunks_exact(2).map(|pair| [pair[0], pair[1]]).collect();
    elements.reverse();
    for (place, element) in bytes[half..].chunks_exact_mut(2).zip(elements) {
        place.copy_from_slice(&element);
    }
    std::fs::write(path, bytes).unwrap();
}

pub fn truncate_weights(folder: &Path) {
    let path = folder.join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
}

pub fn private_folder(into: &Path) -> PathBuf {
    let folder = into.join("run");
    std::fs::DirBuilder::new().mode(0o700).create(&folder).unwrap();
    folder
}

pub fn http() -> reqwest::Client {
    reqwest::Client::builder().no_proxy().timeout(LIMIT).build().unwrap()
}

/// Status and body; a body that is no JSON comes as a string.
pub async fn answer(request: reqwest::RequestBuilder) -> (u16, Value) {
    let response = request.send().await.unwrap();
    let status = response.status().as_u16();
    let text = response.text().await.unwrap();
    (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
}

pub fn sample(rid: &str, max_new_tokens: u64) -> Value {
    let params = json!({"max_new_tokens": max_new_tokens, "temperature": 0.9, "ignore_eos": true});
    json!({"rid": rid, "input_ids": prompt(24), "sampling_params": params})
}

pub fn prompt(length: u32) -> Vec<u32> {
    (0..length).map(|place| (place * place + 11 * place + 5) % 400).collect()
}

/// Whether the process runs; one that only waits to be reaped does not.
pub fn is_alive(pid: i32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with(['Z', 'X'])))
}

/// The process table cannot be subscribed to by others than the parent.
pub fn until_gone(pid: i32) {
    let begun = std::time::Instant::now();
    while is_alive(pid) {
        assert!(begun.elapsed() < LIMIT, "process {pid} does not end");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A builtin server whose log is read.
pub struct BuiltinServer {
    pub url: String,
    child: Child,
    log: mpsc::Receiver<String>,
    pub lines: Vec<String>,
    http: reqwest::Client,
}

pub fn builtin_command(model: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_grail-builtin-server"));
    command.arg("--model-path").arg(model).args(["--port", "0", "--drain-poll-ms", "5", "--threads", "1"]).args(more);
    command.stderr(Stdio::piped()).stdout(Stdio::null()).stdin(Stdio::null());
    command
}

impl BuiltinServer {
    /// Starts it and waits until it is ready.
    pub fn start(model: &Path, more: &[&str]) -> Self {
        Self::start_command(builtin_command(model, more))
    }

    /// Runs a command and waits until it is ready.
    pub fn start_command(command: Command) -> Self {
        let mut server = Self::spawn_command(command);
        let line = server.until_line("Uvicorn running on ");
        let address = line.split("Uvicorn running on ").nth(1).unwrap().split(' ').next().unwrap();
        server.url = address.to_owned();
        server.until_line("The server is fired up and ready to roll!");
        server
    }

    pub fn spawn(model: &Path, more: &[&str]) -> Self {
        Self::spawn_command(builtin_command(model, more))
    }

    fn spawn_command(mut command: Command) -> Self {
        let mut child = command.spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let (sender, log) = mpsc::channel();
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Self { url: String::new(), child, log, lines: Vec::new(), http: http() }
    }

    /// The next line that holds `text`.
    pub fn until_line(&mut self, text: &str) -> String {
        loop {
            let line = self.log.recv_timeout(LIMIT).unwrap_or_else(|_| panic!("no {text:?} in {:#?}", self.lines));
            self.lines.push(line.clone());
            if line.contains(text) {
                return line;
            }
        }
    }

    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid()), signal).unwrap();
    }

    pub fn wait(&mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }

    pub fn get(&self, path: &str) -> impl Future<Output = (u16, Value)> + use<> {
        answer(self.http.get(format!("{}{path}", self.url)))
    }

    pub fn post(&self, path: &str, body: &Value) -> impl Future<Output = (u16, Value)> + use<> {
        answer(self.http.post(format!("{}{path}", self.url)).json(body))
    }

    pub async fn ids(&self, body: &Value) -> Vec<u64> {
        let (status, answer) = self.post("/generate", body).await;
        assert_eq!(status, 200, "{answer}");
        answer["output_ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).collect()
    }

    /// Waits until so many requests run.
    pub async fn until_running(&self, count: u64) {
        while self.get("/v1/loads").await.1["loads"][0]["num_running_reqs"] != count {
            tokio::task::yield_now().await;
        }
    }
}

impl Drop for BuiltinServer {
    fn drop(&mut self) {
        // One that has ended already is what was wanted.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
