// serve.js PORT FOLDER ACCESS_KEY SECRET_KEY: says its port on standard output, ends when standard input does.
'use strict';

const S3rver = require('s3rver');
const { DUMMY_ACCOUNT } = require('s3rver/lib/models/account');

const [port, directory, accessKey, secretKey] = process.argv.slice(2);
DUMMY_ACCOUNT.createKeyPair(accessKey, secretKey);
new S3rver({ address: '127.0.0.1', port: Number(port), directory, silent: true, vhostBuckets: false })
  .run()
  .then(address => console.log(address.port));
process.stdin.resume();
process.stdin.on('end', () => process.exit());
