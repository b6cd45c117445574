#!/usr/bin/env bash
# Starts a server, asks it one question about a text, and ends it.
#
#   bash examples/server_and_client.sh MODEL [TEXT_FILE [QUESTION]]
#
# Variables: PORT (8000), MAX_MODEL_LEN (8192), CACHE_GIB (2), OPTIONS ({}), SECONDS_TO_START (600).
set -euo pipefail

if [[ $# -lt 1 || $1 == --help || $1 == -h ]]; then
    sed -n '2,6s/^# \{0,1\}//p' "$0"
    exit $(($# < 1))
fi
model=$1
text=${2:-$(dirname "$0")/../LICENSE}
question=${3:-"What does this text allow, in one sentence?"}
port=${PORT:-8000}

# What the cache may take is in bytes here, and both tiers are in it.
vllm serve "$model" --port "$port" \
    --attention-backend tailorkv \
    --additional-config "{\"tailorkv\": ${OPTIONS:-{\}}}" \
    --max-model-len "${MAX_MODEL_LEN:-8192}" \
    --kv-cache-memory-bytes $((${CACHE_GIB:-2} << 30)) &
server=$!

# Under load vLLM may wait for its clients when it is ended, so it is killed after some time.
end() {
    kill "$server" 2>/dev/null || return 0
    for _ in $(seq 30); do
        kill -0 "$server" 2>/dev/null || return 0
        sleep 1
    done
    kill -9 "$server"
}
trap end EXIT

for _ in $(seq "${SECONDS_TO_START:-600}"); do
    kill -0 "$server" 2>/dev/null || { echo "the server ended" >&2; exit 1; }
    python3 -c "import urllib.request as r; r.urlopen('http://127.0.0.1:$port/health')" \
        2>/dev/null && break
    sleep 1
done
python3 "$(dirname "$0")/client.py" --url "http://127.0.0.1:$port/v1" \
    --text "$text" --question "$question" --max-tokens 64
