// A CSI driver by Node: node driver.js STACK SOCKET CODE MESSAGE BYTES
//
// STACK is grpc-js or http2; a Probe is answered with the gRPC code and message, where the code is 0 with a reply of
// this many bytes. Prints a line once it listens, and ends with its standard input.
"use strict";
const http2 = require("node:http2");

const [stack, socket, codeText, message, bytes] = process.argv.slice(2);
const code = Number(codeText);
const reply = Buffer.alloc(Number(bytes), "\x0a\x02\x08\x01");
const listening = () => console.log("listening");

function serveByGrpcJs() {
  const grpc = require("@grpc/grpc-js");
  const same = (data) => data;
  const server = new grpc.Server();
  server.addService(
    {
      Probe: {
        path: "/csi.v1.Identity/Probe",
        requestStream: false,
        responseStream: false,
        requestSerialize: same,
        requestDeserialize: same,
        responseSerialize: same,
        responseDeserialize: same,
      },
    },
    { Probe: (call, answer) => (code ? answer({ code, details: message }) : answer(null, reply)) },
  );
  server.bindAsync("unix:" + socket, grpc.ServerCredentials.createInsecure(), (error) => {
    if (error) throw error;
    listening();
  });
}

function serveByHttp2() {
  // As much padding as there can be, and early hints.
  const server = http2.createServer({ paddingStrategy: http2.constants.PADDING_STRATEGY_MAX });
  server.on("stream", (stream, headers) => {
    stream.additionalHeaders({ ":status": 103, link: "</nothing>; rel=preload" });
    const status = { "grpc-status": String(code), "grpc-message": encodeURIComponent(message) };
    const isProbe = headers[":path"] === "/csi.v1.Identity/Probe" && headers.te === "trailers";
    if (!isProbe || code) {
      const kind = isProbe ? { "content-type": "application/grpc", ...status } : { "content-type": "text/plain" };
      stream.respond({ ":status": isProbe ? 200 : 404, ...kind }, { endStream: true });
      return;
    }
    stream.respond({ ":status": 200, "content-type": "application/grpc+proto" }, { waitForTrailers: true });
    stream.on("wantTrailers", () => stream.sendTrailers(status));
    const prefix = Buffer.alloc(5);
    prefix.writeUInt32BE(reply.length, 1);
    stream.write(prefix);
    stream.end(reply);
  });
  server.listen(socket, listening);
}

process.stdin.resume().on("end", () => process.exit(0));
({ "grpc-js": serveByGrpcJs, http2: serveByHttp2 })[stack]();
